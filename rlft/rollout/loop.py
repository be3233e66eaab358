"""Decoding for GPT-2 on the CPU, the whole loop compiled.

A very small policy spends its time in torch on calls, not on arithmetic; a large one on products of a few rows with
matrices that come from memory, which `rlft.kernels` does faster. numba is an optional dependency (the extra `fast`) and
takes a while to import, so the first `decode` imports it, and with it `loop_state`, `loop_steps` and `loop_layers`.

A row's bits depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from functools import partial
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from rlft import compiled
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.rollout.cache import PrefixCache
from rlft.rollout.sampling import Sampling

ALONE = 1_000_000  # parameters up to which threads decode rows of their own; above, all share each product
FEW = 32  # rows that a thread takes alone


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
    from rlft.rollout import loop_state, loop_steps

    num_rows, threads = len(first_hidden), torch.get_num_threads()
    ids, logprobs = torch.zeros(num_rows, max_new, dtype=torch.int64), torch.zeros(num_rows, max_new)
    counts, stopped = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.bool)
    lengths = prefix.lengths[prompt_of_row]
    if bool((lengths + room.clamp(max=max_new) > policy.context_length).any()):  # compiled code checks no index
        raise ValueError(f"a row has room for more tokens than the context of {policy.context_length} has positions")
    if draws is not None and draws.shape != ids.shape:
        raise ValueError(f"draws must be [rows, max_new] = {list(ids.shape)}, got {list(draws.shape)}")
    draws = draws.contiguous() if draws is not None else torch.empty(num_rows, 0, dtype=torch.float64)
    rows = (lengths, prompt_of_row, room, draws, ids, logprobs, counts, stopped)
    prompts, decode_rows = loop_state.prompts_of(prefix), loop_steps.function()
    settings = (
        np.float32(policy.config.layer_norm_epsilon), np.float32(temperature), -1 if eos_id is None else eos_id
    )  # fmt: skip
    matrices = loop_state.matrices_of(policy)  # which must live on: the weights hold their addresses
    weights = loop_state.weights_of(policy, matrices)

    def state_of(these: slice, team: int) -> loop_state.State:
        mine = [tensor[these].numpy() for tensor in rows]  # views: what is written is in the results
        return loop_state.state_of(policy, first_hidden[these], prompts, mine, team)

    if policy.num_parameters() <= ALONE:
        few = min(FEW, -(-num_rows // threads))
        states = [state_of(slice(start, start + few), 1) for start in range(0, num_rows, few)]
        compiled.in_threads([partial(decode_rows, weights, state, *settings, 0, 1) for state in states])
    else:
        state = state_of(slice(None), threads)
        compiled.precompile(decode_rows, weights, state, *settings, 0, threads)
        tasks = [partial(decode_rows, weights, state, *settings, thread, threads) for thread in range(threads)]
        compiled.in_team(tasks, stop=partial(state.sync.__setitem__, loop_steps.STOP, 1))
    return ids, logprobs, counts, stopped
