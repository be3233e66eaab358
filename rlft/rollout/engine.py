"""Rollout: prefill each prompt once for its whole group, then decode token by token.

Rows are right-padded; the cache is preallocated; rows that ended are compacted away; there are no logits processors.
The sampler's logprobs come with the tokens, so that the first update needs no second pass for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.models.base import CausalLM
from rlft.models.scorer import Rows
from rlft.rollout.cache import DecodeCache, PrefixCache
from rlft.rollout.sampling import Sampling, filtered, sample, uniforms
from rlft.trainer.batch import pad

KEEP_FRACTION = 0.75  # rows are compacted when fewer than this share of those in the cache still decode


@dataclass(frozen=True)
class Rollout:
    """B = P * group_size completions; the group of prompt p is rows p * group_size .. (p + 1) * group_size - 1."""

    rows: Rows
    logprobs: Tensor  # [B, T] of the sampler, at its temperature; 0 outside the mask
    finish_reasons: list[str]  # "stop": the end token was drawn; "length": max_new_tokens or the context was reached

    def completions(self) -> list[list[int]]:
        """Return each row's counted token ids."""
        lengths = self.rows.completion_mask.sum(dim=1).tolist()
        return [ids[:n] for ids, n in zip(self.rows.completion_ids.tolist(), lengths, strict=True)]


def select_prompts(rollout: Rollout, prompts: list[int], *, group_size: int) -> Rollout:
    """Return the groups of these prompts (indices in ascending order), as a rollout of theirs alone would be."""
    rows = [p * group_size + i for p in prompts for i in range(group_size)]
    old = rollout.rows
    prompt_of_row = torch.arange(len(prompts), device=old.prompt_of_row.device).repeat_interleave(group_size)
    kept = Rows(
        old.prompt_ids[prompts], old.prompt_lengths[prompts], prompt_of_row, old.completion_ids[rows],
        old.completion_mask[rows],
    )  # fmt: skip
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
) -> Rollout:
    """Draw `group_size` completions for each prompt (lists of ids, none empty).

    A sample's identity is (seed, stream, step, first_prompt + its prompt's index, member of the group): the tokens do
    not depend on what else is in the batch. A row whose prompt leaves fewer than `max_new_tokens` positions stops at
    the context's end, with finish reason "length". Raises `ValueError` for an empty prompt or one that fills the
    context.
    """
    _check_prompts(prompts, policy.context_length)
    device = device or policy.head_weight.device
    prompt_ids, prompt_mask = pad(prompts, device=device)
    lengths = prompt_mask.sum(dim=1)
    prompt_of_row = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    room = policy.context_length - lengths[prompt_of_row]  # [B] new tokens that have a position
    max_new = min(sampling.max_new_tokens, int(room.max()))
    was_training = policy.training
    policy.eval()
    prefix = PrefixCache(lengths)
    hidden = policy(prompt_ids, cache=prefix)
    hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1].index_select(0, prompt_of_row)
    draws = None
    if not sampling.greedy:
        numbers = [first_prompt + p for p in range(len(prompts)) for _ in range(group_size)]
        members = list(range(group_size)) * len(prompts)
        draws = torch.from_numpy(
            uniforms(seed=seed, stream=stream, step=step, prompts=numbers, members=members, num_tokens=max_new)
        ).to(device)
    cache = None  # one new token follows from the prompt alone
    if max_new > 1:
        cache = DecodeCache(prefix, prompt_of_row, max_new_tokens=max_new, shape=policy.cache_shape)
    ids, logprobs, num_tokens, stopped = _decode(
        policy, hidden, cache, lengths[prompt_of_row], room, draws, max_new=max_new, sampling=sampling, eos_id=eos_id
    )
    policy.train(was_training)
    width = int(num_tokens.max())
    mask = torch.arange(width, device=device)[None] < num_tokens[:, None]
    rows = Rows(prompt_ids, lengths, prompt_of_row, ids[:, :width].contiguous(), mask)
    return Rollout(rows, logprobs[:, :width].contiguous(), ["stop" if s else "length" for s in stopped.tolist()])


def _decode(
    policy: CausalLM,
    hidden: Tensor,  # [B, C] that predicts the first new token
    cache: DecodeCache | None,
    positions: Tensor,  # [B] of the first new token
    room: Tensor,  # [B]
    draws: Tensor | None,  # [B, max_new] float64
    *,
    max_new: int,
    sampling: Sampling,
    eos_id: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids and logprobs `[B, max_new]` (0 after a row's end), token counts `[B]`, and who drew the end token."""
    num_rows, device = len(hidden), hidden.device
    ids = torch.zeros(num_rows, max_new, dtype=torch.int64, device=device)
    logprobs = torch.zeros(num_rows, max_new, dtype=torch.promote_types(hidden.dtype, torch.float32), device=device)
    counts = torch.zeros(num_rows, dtype=torch.int64, device=device)
    stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)
    cached = torch.arange(num_rows, device=device)  # the rows that the cache holds, finished ones among them
    for t in range(max_new):
        logits = (hidden @ policy.head_weight.to(hidden.dtype).t()) / sampling.temperature
        token, logprob = _choose(logits, draws[cached, t] if draws is not None else None, t, sampling, eos_id)
        is_open = ~stopped[cached] & (room[cached] > t)
        ids[cached, t] = torch.where(is_open, token, 0)
        logprobs[cached, t] = torch.where(is_open, logprob, 0.0)
        counts[cached] += is_open
        if eos_id is not None:
            stopped[cached] |= is_open & (token == eos_id)
        left = ~stopped[cached] & (room[cached] > t + 1)
        num_left = int(left.sum())
        if num_left == 0 or t + 1 == max_new or cache is None:
            break
        if num_left < KEEP_FRACTION * len(cached):
            kept = left.nonzero()[:, 0]
            cache.keep(kept)
            cached, token = cached[kept], token[kept]
        # A finished row that is still in the cache goes on at its last position; what it draws is not written.
        place = (positions[cached] + t).clamp(max=policy.context_length - 1)
        hidden = policy(token[:, None], positions=place[:, None], cache=cache)[:, 0]
    return ids, logprobs, counts, stopped


def _choose(
    logits: Tensor, draw: Tensor | None, t: int, sampling: Sampling, eos_id: int | None
) -> tuple[Tensor, Tensor]:
    if t < sampling.min_new_tokens and eos_id is not None:
        logits[:, eos_id] = -torch.inf
    logits = filtered(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    if draw is not None:
        return sample(logits, draw)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    token = logits.argmax(dim=-1)
    return token, logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]


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
