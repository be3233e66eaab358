"""Compiled attention of packed rows to their own tokens and to a context that several rows share.

Queries, keys and values are read where a layer's projection wrote them, and gradients are written in the same layout:
nothing is spread out, padded, copied for each row or transposed back. numba is an optional dependency (the extra
`fast`) and slow to import, so the first call imports it, with `attention_loops`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.cpu import compiled

WIDTH = 16  # a head's width must be a multiple of it: vectors are 8 or 16 floats long
CHUNKS = 8  # pieces of work for each thread, if there are enough contexts: none waits long for the last one


@dataclass(frozen=True)
class Segments:
    """Which of N packed tokens belong together: P contexts, and B rows of which each continues one.

    A token attends to the tokens of its own segment up to itself, and a row's also to its whole context. Every token is
    in one segment. For each segment, `contexts` and `rows` hold its first token and its number of tokens.
    """

    num_tokens: int  # N
    contexts: Tensor  # [P, 2] int64
    rows: Tensor  # [B, 2] int64, ordered by context
    first_row: Tensor  # [P + 1] int64: context p has rows first_row[p] .. first_row[p + 1] - 1

    @classmethod
    def of(cls, contexts: Tensor, rows: Tensor, context_of_row: Tensor) -> Segments | None:
        """Return these segments, rows ordered by context, or None on another device than a CPU.

        Raises:
            ValueError: where segments overlap or leave a token out, or where a row's context does not exist.
        """
        if contexts.device.type != "cpu":
            return None
        order = context_of_row.argsort(stable=True)
        counts = torch.bincount(context_of_row, minlength=len(contexts))
        segments = torch.cat([contexts, rows])
        segments = segments[segments[:, 1].argsort(stable=True)]  # of those with one start, empty ones come first
        starts, lengths = segments[segments[:, 0].argsort(stable=True)].unbind(1)
        ends = lengths.cumsum(0)
        if len(counts) > len(contexts) or bool(((starts != ends - lengths) | (lengths < 0)).any()):
            raise ValueError(
                f"every token must be in one segment and every row continue a context, got contexts "
                f"{contexts.tolist()} and rows {rows.tolist()} (first token, length), which continue "
                f"{context_of_row.tolist()}"
            )
        first_row = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(int(ends[-1]), contexts.contiguous(), rows[order], first_row)


def fits(qkv: Tensor, num_heads: int) -> bool:
    """Return whether `attend` can take these queries, keys and values."""
    is_wide = qkv.shape[-1] % (3 * num_heads * WIDTH) == 0
    return is_wide and qkv.device.type == "cpu" and qkv.dtype == torch.float32 and compiled.is_possible()


def attend(qkv: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for each token and head over the tokens it attends to; differentiable once.

    Args:
        qkv: [N, 3 C] float32 on the CPU: queries, keys and values, each with its heads next to each other.
        segments: of the N tokens.

    Returns:
        [N, C]. A token's bits depend on nothing but its segment and context.

    Raises:
        ValueError: where the segments have another number of tokens.
    """
    if qkv.dim() != 2 or len(qkv) != segments.num_tokens:  # compiled code checks no index
        raise ValueError(f"qkv must be [N, 3 C] of the segments' {segments.num_tokens} tokens, got {list(qkv.shape)}")
    return _Attention.apply(qkv.contiguous(), segments, num_heads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, segments: Segments, num_heads: int) -> Tensor:
        N, C = len(qkv), qkv.shape[1] // 3
        out, normalisers = qkv.new_empty(N, C), qkv.new_empty(num_heads, N)
        _in_threads(_compiled()[0], qkv, segments, num_heads, out, normalisers)
        ctx.save_for_backward(qkv, out, normalisers)
        ctx.segments, ctx.num_heads = segments, num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, normalisers = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        _in_threads(_compiled()[1], qkv, ctx.segments, ctx.num_heads, out, normalisers, grad.contiguous(), grad_qkv)
        return grad_qkv, None, None


def _in_threads(function: Any, qkv: Tensor, segments: Segments, num_heads: int, *others: Tensor) -> None:
    """Call a compiled function on parts of the contexts and heads; no two parts write to the same place."""
    given = (qkv, segments.contexts, segments.rows, segments.first_row)
    arrays, rest = [x.detach().numpy() for x in given], [x.detach().numpy() for x in others]
    num_contexts, threads = len(segments.contexts), torch.get_num_threads()
    size = -(-num_contexts // (CHUNKS * threads))
    heads = -(-num_heads // -(-2 * threads // num_contexts))  # a token's heads lie side by side, best for one thread
    parts = itertools.product(range(0, num_contexts, size), range(0, num_heads, heads))

    def work(first: int, head: int) -> None:
        last, last_head = min(first + size, num_contexts), min(head + heads, num_heads)
        function(*arrays, num_heads, first, last, head, last_head, *rest)

    if not function.signatures:  # compile in this thread, where a signal can interrupt it
        compiled.precompile(function, *arrays, num_heads, 0, 0, 0, 0, *rest)
    compiled.in_threads(partial(work, *part) for part in parts)


@cache
def _compiled() -> tuple[Any, Any]:
    """Return `forward` and `backward`, compiled so that infinities and NaNs keep their meaning."""
    from rlft.cpu import attention_loops as loops

    made = partial(compiled.function, options=compiled.options("contract", "nsz"), calls=loops.CALLS, apart=loops.APART)
    return made(loops.forward), made(loops.backward)
