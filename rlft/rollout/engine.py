"""Rollout: prefill each prompt once for its whole group, then decode token by token.

Rows are right-padded, caches are preallocated, and there are no logits processors. The sampler's logprobs come with the
tokens, so that the first update needs no second pass for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.core.batch import Rows, pad
from rlft.core.metrics import Clock
from rlft.cpu import compiled
from rlft.cpu import decode as compiled_loop
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.rollout import cuda_graph
from rlft.rollout.batching import RunningBatch, WaitingQueue
from rlft.rollout.sampling import Identity, Sampling
from rlft.rollout.state import Prefilled, RolloutState

CHECK_EVERY = 8  # on a GPU, the steps between two looks at which rows ended: each look waits for the GPU


@dataclass(frozen=True)
class Rollout:
    """B = P * group_size completions; the group of prompt p is rows p * group_size .. (p + 1) * group_size - 1."""

    rows: Rows
    logprobs: Tensor  # [B, T] of the sampler, at its temperature; 0 outside the mask
    finish_reasons: list[str]  # "stop": the end token was drawn; "length": max_new_tokens or the context was full

    def completions(self) -> list[list[int]]:
        """Return each row's counted token ids."""
        lengths = self.rows.completion_mask.sum(dim=1).tolist()
        return [ids[:n] for ids, n in zip(self.rows.completion_ids.tolist(), lengths, strict=True)]


def select_prompts(rollout: Rollout, prompts: list[int], *, group_size: int) -> Rollout:
    """Return the rollout of these prompts alone (indices in ascending order)."""
    rows = [p * group_size + i for p in prompts for i in range(group_size)]
    old = rollout.rows
    prompt_of_row = torch.arange(len(prompts), device=old.prompt_of_row.device).repeat_interleave(group_size)
    completions = old.completion_ids[rows], old.completion_mask[rows]
    kept = Rows(old.prompt_ids[prompts], old.prompt_lengths[prompts], prompt_of_row, *completions)
    return Rollout(kept, rollout.logprobs[rows], [rollout.finish_reasons[row] for row in rows])


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """Return several rollouts of the same group size as one, padded on the right to the longest."""
    rows = [rollout.rows for rollout in rollouts]
    starts = torch.tensor([0, *(len(r.prompt_ids) for r in rows)]).cumsum(0).tolist()
    merged = Rows(
        _stack([r.prompt_ids for r in rows]),
        torch.cat([r.prompt_lengths for r in rows]),
        torch.cat([r.prompt_of_row + start for r, start in zip(rows, starts, strict=False)]),
        _stack([r.completion_ids for r in rows]),
        _stack([r.completion_mask for r in rows]),
    )
    reasons = [reason for rollout in rollouts for reason in rollout.finish_reasons]
    return Rollout(merged, _stack([rollout.logprobs for rollout in rollouts]), reasons)


def _stack(parts: list[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


@torch.no_grad()
def generate(
    policy: CausalLM,
    prompts: list[list[int]],
    *,
    group_size: int,
    sampling: Sampling,
    eos_id: int | None,
    seed: int,
    step: int = 0,
    stream: str = "rollout",
    first_prompt: int = 0,
    device: torch.device | None = None,
    clock: Clock | None = None,
) -> Rollout:
    """Draw `group_size` completions for each prompt (lists of ids, none empty).

    A sample's identity is (seed, stream, step, first_prompt + its prompt's index, member of the group): the tokens do
    not depend on what else is in the batch. A row whose prompt leaves fewer than `max_new_tokens` positions stops at
    the context's end, with finish reason "length". With `sampling.max_rows`, at most so many rows decode at once and
    others are admitted as those end, so that a rollout of any size fits. `clock` gets the seconds of "prefill" (the
    forward of prompts) and "decode".

    Raises `ValueError` for an empty prompt or one that fills the context.
    """
    _check_prompts(prompts, policy.context_length)
    device, clock = device or policy.head_weight.device, clock or Clock()
    prompt_ids, prompt_mask = pad(prompts, device=device)
    lengths = prompt_mask.sum(dim=1)
    prompt_of_row = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    numbers = [first_prompt + p for p in range(len(prompts)) for _ in range(group_size)]
    identity = Identity(seed, stream, step, numbers, list(range(group_size)) * len(prompts))
    state = RolloutState(policy, lengths[prompt_of_row], identity, sampling=sampling, eos_id=eos_id)
    was_training = policy.training
    policy.eval()
    _prefill_and_decode(policy, prompt_ids, lengths, state, group_size=group_size, clock=clock)
    policy.train(was_training)
    width = int(state.counts.max())
    mask = torch.arange(width, device=device)[None] < state.counts[:, None]
    rows = Rows(prompt_ids, lengths, prompt_of_row, state.ids[:, :width].contiguous(), mask)
    reasons = ["stop" if stopped else "length" for stopped in state.stopped.tolist()]
    return Rollout(rows, state.logprobs[:, :width].contiguous(), reasons)


def _prefill_and_decode(
    policy: CausalLM, prompt_ids: Tensor, lengths: Tensor, state: RolloutState, *, group_size: int, clock: Clock
) -> None:
    """Prefill and decode all rows of `state`, by the fastest of the three decoders that can."""
    device, sampling = lengths.device, state.sampling
    waiting = WaitingQueue(len(lengths), group_size=group_size, max_rows=sampling.max_rows)
    is_compiled = waiting.max_rows >= len(state.limit) and fits_cpu(policy, sampling, device)
    is_graph = cuda_graph.fits(policy, device) and state.max_new > 1
    running: RunningBatch | None = None
    while waiting.units:
        units = waiting.take(0 if running is None else len(running.rows))
        with clock("prefill"):
            new = Prefilled.of(policy, prompt_ids, lengths, units, group_size=group_size)
        with clock("decode"):
            if is_compiled:  # a GPT-2 in float32 on a CPU, all rows at once: the whole loop is compiled
                _decode_compiled(policy, new, state)
            elif is_graph:  # a GPU: a step is one launch, and rows decode to their ends before others begin
                cuda_graph.decode(policy, new, state, check_every=CHECK_EVERY)
            else:  # plain torch: waiting rows are admitted as others end
                running = RunningBatch(policy, new, max_new=state.max_new) if running is None else running.admit(new)
                check_every = 1 if device.type == "cpu" else CHECK_EVERY
                running = running.decode(state, until_free=waiting.num_wanted, check_every=check_every)


def _decode_compiled(policy: CausalLM, new: Prefilled, state: RolloutState) -> None:
    state.ids, state.logprobs, state.counts, state.stopped = compiled_loop.decode(
        policy,
        new.prefix,
        new.hidden,
        new.prompt_of_row,
        state.limit,
        state.draws,
        max_new=state.max_new,
        temperature=state.sampling.temperature,
        eos_id=state.eos_id,
    )


def fits_cpu(policy: CausalLM, sampling: Sampling, device: torch.device) -> bool:
    """Return whether the compiled loop of `rlft.cpu.decode` can decode this policy with this sampling."""
    return (
        type(policy) is GPT2
        and policy.mask_id is None
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in policy.parameters())
        and device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and (sampling.top_k, sampling.top_p, sampling.min_new_tokens) == (0, 1.0, 0)
        and compiled.is_possible()
    )


def _check_prompts(prompts: list[list[int]], context_length: int) -> None:
    if not prompts:
        raise ValueError("no prompts were given")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {i} is empty: start it with the end-of-text token, as GPT-2's unconditional samples do"
            )
        if len(prompt) >= context_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room in a context of {context_length}"
            )
