"""Decoding for GPT-2 on the CPU, the whole loop compiled.

A very small policy spends its time in torch on calls, not on arithmetic; a large one on products of a few rows with
matrices that come from memory, which `rlft.kernels` does faster. numba is an optional dependency (the extra `fast`) and
takes a while to import, so the first `decode` imports it, and with it `loop_steps`, what numba compiles.

A row's bits depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlft import compiled
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.rollout.cache import PrefixCache
from rlft.rollout.sampling import Sampling

ALONE = 1_000_000  # parameters up to which threads decode rows of their own; above, all share each product
VECTOR = 16  # rows, or slots, that are computed together
FEW = 2 * VECTOR  # rows that a thread takes alone
WIDTH = 4 * VECTOR  # rows in a panel
_TEAM = threading.Lock()  # two teams at once could each hold threads that the other waits for


class _Weights(NamedTuple):
    """A policy's parameters, float32; layer norms are [.., 2, C], weight and bias. Matrices stay where they are."""

    wte: np.ndarray  # [V, C]
    wpe: np.ndarray  # [N, C]
    matrices: np.ndarray  # [L, 4] int64 addresses: c_attn, its c_proj, c_fc, its c_proj
    head: int  # address
    ln_1: np.ndarray  # [L, 2, C]
    c_attn: np.ndarray  # [L, 3 C], a bias, as the next three
    attn_proj: np.ndarray  # [L, C]
    ln_2: np.ndarray  # [L, 2, C]
    c_fc: np.ndarray  # [L, 4 C]
    mlp_proj: np.ndarray  # [L, C]
    ln_f: np.ndarray  # [2, C]
    zeros: np.ndarray  # [V], the head's bias


class _State(NamedTuple):
    """What a team of T threads reads and writes for R rows; what each row has comes as the caller gave it."""

    sync: np.ndarray  # [16] int64, where threads meet
    num_open: np.ndarray  # [1] int64, rows that go on
    rows: np.ndarray  # [R] int64, the first of them those that go on
    x: np.ndarray  # [panels, C, width], the residual stream; width: rows in a panel
    y: np.ndarray  # [panels, C, width]
    inner: np.ndarray  # [panels, 4 C, width]
    logits: np.ndarray  # [panels, V, width]
    largest: np.ndarray  # [blocks, panels, width], of the logits in a block of the vocabulary
    mass: np.ndarray  # [blocks, panels, width] float64
    top: np.ndarray  # [T, panels, width], the largest logits of all
    sums: np.ndarray  # [T, 2, width], as the next three what one thread works with
    query: np.ndarray  # [T, D]
    mixed: np.ndarray  # [T, D in whole vectors]
    scores: np.ndarray  # [T, slots]
    prompt_keys: np.ndarray  # [P, L, H, tiles, D, LANES]
    prompt_values: np.ndarray  # [P, L, H, S, D in whole vectors]
    own_keys: np.ndarray  # [R, L, H, tiles, D, LANES], the rows' own
    own_values: np.ndarray  # [R, L, H, max_new, D in whole vectors]
    lengths: np.ndarray
    prompt_of_row: np.ndarray
    room: np.ndarray
    draws: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    stopped: np.ndarray


def fits(policy: CausalLM, sampling: Sampling, device: torch.device) -> TypeGuard[GPT2]:
    """Return whether `decode` does what the torch loop does for this policy."""
    return (
        type(policy) is GPT2
        and policy.mask_id is None
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in policy.parameters())
        and device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and (sampling.top_k, sampling.top_p, sampling.min_new_tokens) == (0, 1.0, 0)
        and compiled.is_possible()
    )


@torch.no_grad()
def decode(
    policy: GPT2,
    prefix: PrefixCache,
    first_hidden: Tensor,
    prompt_of_row: Tensor,
    room: Tensor,
    draws: Tensor | None,
    *,
    max_new: int,
    temperature: float,
    eos_id: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Continue B rows from their prompts' keys and values; a row ends at `eos_id`, `max_new` tokens, or its room.

    Arguments:
        prefix: keys and values of P prompts, each `[P, H, S, D]`; what lies beyond a prompt's length is not read.
        first_hidden: [B, C] float32, after `ln_f`, that predicts each row's first token.
        prompt_of_row: [B] int64; room: [B] int64, >= 1, new tokens that have a position.
        draws: [B, max_new] float64 uniforms for the rule of `rlft.rollout.sampling.sample`; None takes the first of
            the largest logits.

    Returns:
        ids [B, max_new] int64 and their logprobs [B, max_new] float32 at the temperature (0 after a row's end), token
        counts [B] int64, and who drew the end token, [B] bool.
    """
    num_rows, threads = len(first_hidden), torch.get_num_threads()
    prompts = _tiled(torch.stack(prefix.keys, dim=1)), _in_vectors(torch.stack(prefix.values, dim=1)).numpy()
    ids, logprobs = torch.zeros(num_rows, max_new, dtype=torch.int64), torch.zeros(num_rows, max_new)
    counts, stopped = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.bool)
    draws = draws.contiguous() if draws is not None else torch.empty(num_rows, 0, dtype=torch.float64)
    lengths = prefix.lengths[prompt_of_row]
    # Compiled code does not check its indices.
    assert bool((lengths + room.clamp(max=max_new) <= policy.context_length).all()), "tokens without a position"
    rows = (lengths, prompt_of_row, room, draws, ids, logprobs, counts, stopped)
    matrices, decode_rows = _matrices(policy), _compiled()
    weights, epsilon = _weights(policy, matrices), np.float32(policy.config.layer_norm_epsilon)
    end, scale = -1 if eos_id is None else eos_id, np.float32(temperature)

    def run(these: slice, team: int) -> list[Callable[[], None]]:
        """Return what the threads of a team do for some rows."""
        state = _state(policy, first_hidden[these], prompts, [tensor[these].numpy() for tensor in rows], team)
        return [partial(decode_rows, weights, state, epsilon, scale, end, thread, team) for thread in range(team)]

    if policy.num_parameters() <= ALONE:
        few = min(FEW, -(-num_rows // threads))
        compiled.in_threads([task for start in range(0, num_rows, few) for task in run(slice(start, start + few), 1)])
    else:
        with _TEAM:
            compiled.in_threads(run(slice(0, num_rows), threads))
    return ids, logprobs, counts, stopped


def _matrices(policy: GPT2) -> list[list[Tensor]]:
    """Return each layer's matrices [out, in], and last the head, contiguous."""
    names = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    of_layers: list[list[Tensor]] = [[block.get_parameter(name) for name in names] for block in policy.h]
    return [[matrix.contiguous() for matrix in matrices] for matrices in [*of_layers, [policy.head_weight]]]


def _weights(policy: GPT2, matrices: list[list[Tensor]]) -> _Weights:
    """`matrices` must live as long as what is returned, which holds their addresses."""

    def stacked(name: str) -> np.ndarray:
        return torch.stack([block.get_parameter(name) for block in policy.h]).numpy()

    def norms(name: str) -> np.ndarray:
        return np.stack([stacked(f"{name}.weight"), stacked(f"{name}.bias")], axis=1)

    of_layers, head = matrices[:-1], matrices[-1][0]
    return _Weights(
        policy.wte.weight.numpy(), policy.wpe.weight.numpy(),
        np.array([[matrix.data_ptr() for matrix in layer] for layer in of_layers]), head.data_ptr(),
        norms("ln_1"), stacked("attn.c_attn.bias"), stacked("attn.c_proj.bias"),
        norms("ln_2"), stacked("mlp.c_fc.bias"), stacked("mlp.c_proj.bias"),
        torch.stack([policy.ln_f.weight, policy.ln_f.bias]).numpy(), np.zeros(len(head), dtype=np.float32),
    )  # fmt: skip


def _whole(number: int) -> int:
    """Round up to whole vectors."""
    return -(-number // VECTOR) * VECTOR


def _in_vectors(x: Tensor) -> Tensor:
    """Fill the last dimension up with zeros to whole vectors."""
    return F.pad(x, (0, _whole(x.shape[-1]) - x.shape[-1]))


def _tiled(keys: Tensor) -> np.ndarray:
    """Lay keys `[P, L, H, S, D]` out as products with them read them: `[P, L, H, tiles, D, LANES]`."""
    from rlft.kernels import LANES

    P, L, H, S, D = keys.shape
    padded = F.pad(keys, (0, 0, 0, -S % LANES))
    return padded.view(P, L, H, -1, LANES, D).transpose(4, 5).contiguous().numpy()


def _state(
    policy: GPT2, first_hidden: Tensor, prompts: tuple[np.ndarray, np.ndarray], rows: list[np.ndarray], team: int
) -> _State:
    from rlft.rollout.loop_steps import BLOCK

    (num_rows, C), (V, max_new) = first_hidden.shape, (policy.vocab_size, rows[4].shape[1])
    width = min(WIDTH, _whole(num_rows))
    panels, blocks = -(-num_rows // width), -(-V // BLOCK)
    padded = F.pad(first_hidden, (0, 0, 0, panels * width - num_rows))  # lanes without a row hold numbers too
    y = padded.view(panels, width, C).transpose(1, 2).contiguous().numpy()
    num_layers, num_heads, _, D, lanes = prompts[0].shape[1:]

    def zeros(*size: int, dtype: Any = np.float32) -> np.ndarray:
        return np.zeros(size, dtype=dtype)

    return _State(
        zeros(16, dtype=np.int64), zeros(1, dtype=np.int64), np.arange(num_rows), zeros(panels, C, width), y,
        zeros(panels, 4 * C, width), zeros(panels, V, width), zeros(blocks, panels, width),
        zeros(blocks, panels, width, dtype=np.float64), zeros(team, panels, width), zeros(team, 2, width),
        zeros(team, D), zeros(team, _whole(D)), zeros(team, prompts[1].shape[3] + max_new + lanes), *prompts,
        np.empty((num_rows, num_layers, num_heads, -(-max_new // lanes), D, lanes), dtype=np.float32),
        np.empty((num_rows, num_layers, num_heads, max_new, _whole(D)), dtype=np.float32), *rows,
    )  # fmt: skip


@cache
def _compiled() -> Callable[..., None]:
    from rlft.rollout import loop_steps

    return loop_steps.function()
