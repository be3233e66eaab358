"""Decoding of a GPT-2 on the CPU, with the whole loop compiled.

In torch a very small policy spends its time on calls rather than on arithmetic, and a large one on products of a few
rows with matrices that come from memory, which `rlft.cpu.kernels` does faster. numba is an optional dependency (the
extra `fast`) and slow to import, so the first `decode` imports it, with `decode_state`, `decode_steps` and
`decode_layers`.

A row's bits depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rlft.cpu import compiled

ALONE = 1_000_000  # parameters up to which each thread decodes rows of its own; above, all threads share each product
FEW = 32  # rows that a thread takes alone


class Prefix(Protocol):
    """The keys and values of P prompts."""

    keys: list[Tensor]  # of each layer, [P, H, S, D]; what lies beyond a prompt's length is not read
    values: list[Tensor]
    lengths: Tensor  # [P] int64


@torch.no_grad()
def decode(
    policy: nn.Module,
    prefix: Prefix,
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
        policy: a GPT-2, causal and in float32, whose parameters have their published names.
        prefix: the P prompts.
        first_hidden: [B, C] float32, after `ln_f`; predicts each row's first token.
        prompt_of_row: [B] int64, a row's prompt among the P.
        room: [B] int64, at least 1: new tokens that have a position.
        draws: [B, max_new] float64 uniforms for the rule of `rlft.rollout.sampling.choose`; None takes the first of
            the largest logits.

    Returns:
        ids [B, max_new] int64 and their logprobs [B, max_new] float32 at the temperature (0 after a row's end), token
        counts [B] int64, and whether a row drew the end token, [B] bool.
    """
    from rlft.cpu import decode_state, decode_steps

    num_rows, threads = len(first_hidden), torch.get_num_threads()
    ids, logprobs = torch.zeros(num_rows, max_new, dtype=torch.int64), torch.zeros(num_rows, max_new)
    counts, stopped = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.bool)
    lengths = prefix.lengths[prompt_of_row]
    epsilon: Any = policy.get_submodule("ln_f").eps
    num_positions = len(policy.get_parameter("wpe.weight"))
    if bool((lengths + room.clamp(max=max_new) > num_positions).any()):  # compiled code checks no index
        raise ValueError(f"a row has room for more tokens than the context of {num_positions} has positions")
    if draws is not None and draws.shape != ids.shape:
        raise ValueError(f"draws must be [rows, max_new] = {list(ids.shape)}, got {list(draws.shape)}")
    draws = draws.contiguous() if draws is not None else torch.empty(num_rows, 0, dtype=torch.float64)
    rows = (lengths, prompt_of_row, room, draws, ids, logprobs, counts, stopped)
    prompts, decode_rows = decode_state.prompts_of(prefix.keys, prefix.values), decode_steps.function()
    settings = (np.float32(epsilon), np.float32(temperature), -1 if eos_id is None else eos_id)
    matrices = decode_state.matrices_of(policy, num_layers=len(prefix.keys))  # kept alive: `weights` has addresses only
    weights = decode_state.weights_of(policy, matrices)

    def state_of(these: slice, team: int) -> decode_state.State:
        mine = [tensor[these].numpy() for tensor in rows]  # views: what is written to them is in the results
        return decode_state.state_of(weights, first_hidden[these], prompts, mine, team)

    if sum(p.numel() for p in policy.parameters()) <= ALONE:
        few = min(FEW, -(-num_rows // threads))
        states = [state_of(slice(start, start + few), 1) for start in range(0, num_rows, few)]
        compiled.in_threads([partial(decode_rows, weights, state, *settings, 0, 1) for state in states])
    else:
        state = state_of(slice(None), threads)
        compiled.precompile(decode_rows, weights, state, *settings, 0, threads)
        tasks = [partial(decode_rows, weights, state, *settings, thread, threads) for thread in range(threads)]
        compiled.in_team(tasks, stop=partial(state.sync.__setitem__, decode_steps.STOP, 1))
    return ids, logprobs, counts, stopped
