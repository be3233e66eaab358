"""Rollout: prefill each prompt once for its whole group, then decode token by token.

Rows are right-padded; the cache is preallocated; rows that ended are compacted away; there are no logits processors.
The sampler's logprobs come with the tokens, so that the first update needs no second pass for them.
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
from rlft.models.kv.copied import DecodeCache
from rlft.models.kv.shared import SharedDecodeCache
from rlft.models.kv.static import StaticCache
from rlft.models.rows import prefill
from rlft.rollout import cuda_graph
from rlft.rollout.sampling import Sampling, uniforms
from rlft.rollout.state import Active, RolloutState

CHECK_EVERY = 8  # steps between two looks at which rows ended, on a GPU, which each look waits for
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
    clock: Clock | None = None,
) -> Rollout:
    """Draw `group_size` completions for each prompt (lists of ids, none empty).

    A sample's identity is (seed, stream, step, first_prompt + its prompt's index, member of the group): the tokens do
    not depend on what else is in the batch. A row whose prompt leaves fewer than `max_new_tokens` positions stops at
    the context's end, with finish reason "length". At most `sampling.max_rows` rows decode at once, where that is
    given, and others join as those end: a rollout of any size fits. `clock` takes the seconds of "prefill" and
    "decode".

    Raises `ValueError` for an empty prompt or one that fills the context.
    """
    _check_prompts(prompts, policy.context_length)
    device, clock = device or policy.head_weight.device, clock or Clock()
    prompt_ids, prompt_mask = pad(prompts, device=device)
    lengths = prompt_mask.sum(dim=1)
    prompt_of_row = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    room = policy.context_length - lengths[prompt_of_row]  # [B] new tokens that have a position
    max_new = min(sampling.max_new_tokens, int(room.max()))
    draws = None
    if not sampling.greedy:
        numbers = [first_prompt + p for p in range(len(prompts)) for _ in range(group_size)]
        members = list(range(group_size)) * len(prompts)
        draws = torch.from_numpy(
            uniforms(seed=seed, stream=stream, step=step, prompts=numbers, members=members, num_tokens=max_new)
        ).to(device)
    was_training = policy.training
    policy.eval()
    table = RolloutState(room, draws, max_new=max_new, sampling=sampling, eos_id=eos_id, dtype=policy.head_weight.dtype)
    if (sampling.max_rows or len(room)) >= len(room) and fits_cpu(policy, sampling, device):
        with clock("prefill"):
            last, prefix = prefill(policy, prompt_ids, lengths)
        with clock("decode"):
            table.ids, table.logprobs, table.counts, table.stopped = compiled_loop.decode(
                policy, prefix.keys, prefix.values, prefix.lengths, last[prompt_of_row], prompt_of_row, room, draws,
                max_new=max_new, temperature=sampling.temperature, eos_id=eos_id,
            )  # fmt: skip
    else:
        _in_turn(policy, prompt_ids, lengths, table, group_size=group_size, clock=clock)
    policy.train(was_training)
    width = int(table.counts.max())
    mask = torch.arange(width, device=device)[None] < table.counts[:, None]
    rows = Rows(prompt_ids, lengths, prompt_of_row, table.ids[:, :width].contiguous(), mask)
    reasons = ["stop" if stopped else "length" for stopped in table.stopped.tolist()]
    return Rollout(rows, table.logprobs[:, :width].contiguous(), reasons)


class _Queue:
    """The rows that have not begun, in units that begin together: a prompt's group, or `max_rows` of a larger one."""

    def __init__(self, num_prompts: int, *, group_size: int, max_rows: int | None) -> None:
        self.max_rows = num_prompts * group_size if max_rows is None else max_rows
        size = min(group_size, self.max_rows)
        self.units = [
            range(first + i, first + min(i + size, group_size))
            for first in range(0, num_prompts * group_size, group_size)
            for i in range(0, group_size, size)
        ]

    def take(self, num_active: int) -> list[range]:
        """Return the units that fit beside so many rows, and forget them."""
        number = 0
        while number < len(self.units) and num_active + len(self.units[number]) <= self.max_rows:
            num_active += len(self.units[number])
            number += 1
        taken, self.units = self.units[:number], self.units[number:]
        return taken

    @property
    def wanted(self) -> int:
        """Rows that must have ended before others join; 0 where none wait."""
        return max(len(self.units[0]), int(self.max_rows * (1 - KEEP_FRACTION))) if self.units else 0


def _in_turn(
    policy: CausalLM, prompt_ids: Tensor, lengths: Tensor, table: RolloutState, *, group_size: int, clock: Clock
) -> None:
    """Fill the table: begin as many rows as may decode at once, and others as those end."""
    queue = _Queue(len(lengths), group_size=group_size, max_rows=table.sampling.max_rows)
    active: Active | None = None
    while (units := queue.take(0 if active is None else len(active.rows))) or active is not None:
        if units:
            with clock("prefill"):
                started = _start(policy, prompt_ids, lengths, units, group_size=group_size, max_new=table.max_new)
                active = started if active is None else active.joined(started)
        with clock("decode"):
            assert active is not None
            if isinstance(active.cache, StaticCache):
                cuda_graph.decode(policy, active, table, check_every=CHECK_EVERY)
                active = None
            else:
                active = _decode(policy, active, table, until_free=queue.wanted)


def _start(
    policy: CausalLM, prompt_ids: Tensor, lengths: Tensor, units: list[range], *, group_size: int, max_new: int
) -> Active:
    """Forward the prompts of some units and make a cache for their rows."""
    prompts = torch.tensor([unit[0] // group_size for unit in units], device=lengths.device)
    sizes = torch.tensor([len(unit) for unit in units], device=lengths.device)
    lengths = lengths[prompts]
    prompt_of_row = torch.arange(len(units), device=lengths.device).repeat_interleave(sizes)
    hidden, prefix = prefill(policy, prompt_ids[prompts, : int(lengths.max())], lengths)
    is_shared = policy.takes_packed and len(prompt_of_row) > len(units)
    cache_type: type[DecodeCache | SharedDecodeCache | StaticCache]
    cache_type = SharedDecodeCache if is_shared else DecodeCache
    if cuda_graph.fits(policy, lengths.device):
        cache_type = StaticCache
    cache = None
    if max_new > 1:
        cache = cache_type(prefix, prompt_of_row, max_new_tokens=max_new, shape=policy.cache_shape)
    rows = torch.tensor([row for unit in units for row in unit], device=lengths.device)
    return Active(
        rows, torch.zeros_like(rows), lengths[prompt_of_row], hidden[prompt_of_row], cache, prefix, prompt_of_row
    )


def _decode(policy: CausalLM, active: Active, table: RolloutState, *, until_free: int) -> Active | None:
    """Decode until `until_free` rows have ended (0: all of them); return those that are left, None for none."""
    head = policy.head_weight.to(active.hidden.dtype).t()
    check_every = 1 if active.rows.device.type == "cpu" else CHECK_EVERY
    can_end, num_rows, cache = table.ends_early or active.is_mixed, len(active.rows), active.cache
    assert not isinstance(cache, StaticCache)
    for step in range(1, table.max_new + 1):
        logits, temperature = active.hidden @ head, table.sampling.temperature
        token = table.draw(logits if temperature == 1.0 else logits / temperature, active.rows, active.done)
        active.done, has_room_to_join = active.done + 1, False
        if step == table.max_new or cache is None:
            break
        if can_end and step % check_every == 0:
            is_open = table.is_open(active.rows, active.done)
            num_open = int(is_open.sum())
            if num_open == 0:
                break
            has_room_to_join = 0 < until_free <= num_rows - num_open
            if has_room_to_join or num_open < KEEP_FRACTION * len(active.rows):
                kept = is_open.nonzero()[:, 0]
                cache.keep(kept)
                token, active.rows, active.done, active.position = (
                    x[kept] for x in (token, active.rows, active.done, active.position)
                )
        # A finished row that is still in the cache goes on at its last position; what it draws is not kept.
        place = active.position.clamp(max=policy.context_length - 1)
        active.hidden = policy(token[:, None], positions=place[:, None], cache=cache)[:, 0]
        active.position = active.position + 1
        if has_room_to_join:
            return active
    return None


def fits_cpu(policy: CausalLM, sampling: Sampling, device: torch.device) -> bool:
    """Return whether the compiled loop of `rlft.cpu.decode` does what the loop here does for this policy."""
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
