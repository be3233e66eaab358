"""Logprobs and entropies of tokens from hidden states, without holding the [N, V] logits of all rows at once.

The head's logits are the largest tensor of an update: 64 rows x 1,024 tokens x 50,257 entries are 12 GiB in float32.
Here the head is applied to one chunk of rows at a time. The backward pass computes each chunk's logits again and turns
them into the gradients of `hidden` and `weight` immediately. (Liger-Kernel, arXiv:2410.10989, does both in the forward
pass, and so has to know the loss; here any loss may follow.) If all rows fit in one chunk, its log-softmax is kept for
the backward pass instead of being computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # logits in a chunk, in the dtype in which they are normalised


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logprob of each row's token and the entropy of each row's distribution, both in nats.

        z = hidden @ weight.T / temperature;  logprob = z[id] - logsumexp(z);  entropy = -sum_v p_v log p_v

    The logits are computed in `hidden`'s dtype (in autocast's if it is on) and normalised in float32 at least.

    Args:
        hidden: [N, C] floating, the states that predict `ids`.
        weight: [V, C] floating, the head (GPT-2's `wte`).
        ids: [N] int64 in [0, V).
        temperature: divides the logits; > 0.
        entropy_grad: whether the entropy has a gradient; if not, it is returned detached.
        chunk_rows: rows of logits in memory at once; default: as many as take 64 MiB.

    Returns:
        logprobs and entropy, both [N]; float64 for float64 input, else float32.

    Raises:
        ValueError: for shapes that do not fit, and for a temperature or a chunk that is not positive.
    """
    _check_head(hidden, weight, temperature)
    if ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"ids must be [N] = {list(hidden.shape[:1])}, one for each row of hidden, got {list(ids.shape)}"
        )
    chunk = _chunk_rows(chunk_rows, weight.shape[0], _normal_dtype(_compute_dtype(hidden)))
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, ids, float(temperature), entropy_grad, chunk)
    return logprobs, entropy


@torch.no_grad()
def exact_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the exact KL(policy || reference) of the next-token distributions at each row, without a gradient.

        KL = sum_v p_v (log p_v - log q_v),  p = softmax(hidden @ weight.T / temperature),  q of the reference

    Args:
        hidden: [N, C]; weight: [V, C].
        ref_hidden: [N, D]; ref_weight: [V, D]. The widths C and D may differ, the vocabulary may not.
        temperature: divides both models' logits; > 0.
        chunk_rows: rows of logits in memory at once; default: as many as take 64 MiB for each model.

    Returns:
        [N], nats; float64 for float64 input, else float32.

    Raises:
        ValueError: for shapes that do not fit, and for a temperature or a chunk that is not positive.
    """
    _check_head(hidden, weight, temperature)
    _check_head(ref_hidden, ref_weight, temperature)
    if weight.shape[0] != ref_weight.shape[0] or hidden.shape[0] != ref_hidden.shape[0]:
        raise ValueError(
            f"policy and reference must have the same rows and vocabulary, got {hidden.shape[0]} and "
            f"{ref_hidden.shape[0]} rows, {weight.shape[0]} and {ref_weight.shape[0]} entries"
        )
    dtype, ref_dtype = _compute_dtype(hidden), _compute_dtype(ref_hidden)
    chunk = _chunk_rows(chunk_rows, weight.shape[0], _normal_dtype(dtype))
    head, ref_head = weight.to(dtype), ref_weight.to(ref_dtype)
    kl = torch.empty(hidden.shape[0], dtype=_normal_dtype(dtype), device=hidden.device)
    for rows in _chunks(hidden.shape[0], chunk):
        logp = _log_softmax(hidden[rows].to(dtype), head, temperature)
        logq = _log_softmax(ref_hidden[rows].to(ref_dtype), ref_head, temperature)
        kl[rows] = (logp.exp() * logq.neg_().add_(logp)).sum(-1)
    return kl


class _TokenLogprobs(torch.autograd.Function):
    """The chunked head. d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, entropy_grad: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        num_rows, dtype = hidden.shape[0], _compute_dtype(hidden)
        head = weight.to(dtype)
        logprobs = torch.empty(num_rows, dtype=_normal_dtype(dtype), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        logp = None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(num_rows, chunk):
                logp = _log_softmax(hidden[rows].to(dtype), head, temperature)
                logprobs[rows] = logp.gather(-1, ids[rows, None])[:, 0]
                entropy[rows] = (logp.exp().mul_(logp)).sum(-1).neg_()
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kept = logp if needs_grad and num_rows <= chunk else None  # a single chunk is kept; several are computed again
        ctx.save_for_backward(hidden, weight, ids, entropy if entropy_grad else None, kept)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, entropy, kept = ctx.saved_tensors
        if grad_logprobs is None and (grad_entropy is None or entropy is None):
            return None, None, None, None, None, None
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = ctx.dtype
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # summed over chunks in float32 at least: in bfloat16, later chunks would be lost to rounding
        grad_weight = torch.zeros_like(weight, dtype=_normal_dtype(dtype)) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden.shape[0], ctx.chunk):
                inputs = hidden[rows].to(dtype)
                logp = kept if kept is not None else _log_softmax(inputs, head, ctx.temperature)
                grad = logp.exp()  # p, which the next lines turn, in place, into the gradient of the logits
                if entropy is not None and grad_entropy is not None:
                    pull = (logp + entropy[rows, None]).mul_(grad_entropy[rows, None])
                    grad.mul_(pull.add_(grad_logprobs[rows, None]) if grad_logprobs is not None else pull)
                elif grad_logprobs is not None:
                    grad.mul_(grad_logprobs[rows, None])
                grad.neg_()
                if grad_logprobs is not None:
                    grad.scatter_add_(-1, ids[rows, None], grad_logprobs[rows, None])
                scaled = (grad if ctx.temperature == 1.0 else grad.div_(ctx.temperature)).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (scaled @ head).to(hidden.dtype)
                if grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(scaled.T, inputs)
                elif grad_weight is not None:
                    grad_weight.add_(scaled.T @ inputs)
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None, None, None, None


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """Return log softmax(hidden @ head.T / temperature), [rows, V], normalised in float32 at least."""
    logits = hidden @ head.T
    if temperature != 1.0:
        logits = logits.to(_normal_dtype(logits.dtype)).div_(temperature)
    return torch.log_softmax(logits, dim=-1, dtype=_normal_dtype(logits.dtype))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the head's matrix product: autocast's if it is on, else `hidden`'s."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _normal_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits of `dtype` are normalised."""
    return torch.promote_types(dtype, torch.float32)


def _chunk_rows(chunk_rows: int | None, vocab_size: int, dtype: torch.dtype) -> int:
    """Return the given number of rows, or as many as make `CHUNK_BYTES` of logits."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, or None for about 64 MiB of logits, got {chunk_rows}")
    return chunk_rows or max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))


def _chunks(num_rows: int, chunk: int) -> Iterator[slice]:
    """Yield slices that cover `num_rows` rows, `chunk` at a time."""
    return (slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk))


def _check_head(hidden: Tensor, weight: Tensor, temperature: float) -> None:
    """Raise `ValueError` for states and a head that do not fit, and for a temperature that is not positive."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, C] and weight [V, C] with the same C, got {list(hidden.shape)} and "
            f"{list(weight.shape)}; flatten rows and times first, e.g. hidden[mask]"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature must be greater than 0, got {temperature}; greedy choice is the sampler's business"
        )
