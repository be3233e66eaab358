"""The state of a rollout: the tokens drawn so far, the draw of the next ones, and rows that are ready to decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.models.base import CausalLM
from rlft.models.kv.prefix import PrefixCache
from rlft.models.rows import prefill
from rlft.rollout.sampling import Identity, Sampling, choose


class RolloutState:
    """The tokens that B rows have drawn so far, and the uniforms that they draw with.

    `lengths` [B] are those of the prompts that they continue. `ids` and `logprobs` are `[B, max_new + 1]`: the last
    column takes what finished rows go on drawing.
    """

    def __init__(
        self, policy: CausalLM, lengths: Tensor, identity: Identity, *, sampling: Sampling, eos_id: int | None
    ) -> None:
        room, dtype = policy.context_length - lengths, policy.head_weight.dtype  # [B] new tokens that have a position
        self.sampling, self.eos_id, self.max_new = sampling, eos_id, min(sampling.max_new_tokens, int(room.max()))
        self.limit = room.clamp(max=self.max_new)  # [B] tokens that a row may have
        self.ends_early = eos_id is not None or bool((room < self.max_new).any())
        self.draws: Tensor | None = None  # [B, max_new]; None: greedy
        if not sampling.greedy:
            self.draws = identity.uniforms(self.max_new, device=room.device)
        self.ids = room.new_zeros(len(room), self.max_new + 1)
        self.logprobs = torch.zeros_like(self.ids, dtype=torch.promote_types(dtype, torch.float32))
        self.counts = torch.zeros_like(room)
        self.stopped = torch.zeros_like(room, dtype=torch.bool)

    def draw(self, logits: Tensor, rows: Tensor, done: Tensor) -> Tensor:
        """Draw the next tokens [A] of `rows` [A], which have `done` [A] tokens, from logits [A, V]."""
        place = done.clamp(max=self.max_new - 1)
        uniform = None if self.draws is None else self.draws[rows, place]
        token, logprob = choose(logits, uniform, sampling=self.sampling, eos_id=self.eos_id, done=done)
        is_open = self.is_open(rows, done)
        place = torch.where(is_open, done, self.max_new)
        self.ids[rows, place] = token
        self.logprobs[rows, place] = logprob
        self.counts[rows] += is_open
        if self.eos_id is not None:
            self.stopped[rows] |= is_open & (token == self.eos_id)
        return token

    def is_open(self, rows: Tensor, done: Tensor) -> Tensor:
        """Return which of `rows` [A], that have `done` [A] tokens, go on: bool [A]."""
        return ~self.stopped[rows] & (done < self.limit[rows])


@dataclass(frozen=True)
class Prefilled:
    """Rows of a rollout, A of them, whose prompts have been forwarded and that have drawn no token yet."""

    rows: Tensor  # [A] int64, their numbers in the rollout
    hidden: Tensor  # [A, C], predicts each row's first token
    position: Tensor  # [A] int64, of each row's first token
    prefix: PrefixCache  # keys and values of P prompts
    prompt_of_row: Tensor  # [A] int64, a row's prompt among the P

    @classmethod
    def of(cls, policy: CausalLM, ids: Tensor, lengths: Tensor, units: list[range], *, group_size: int) -> Prefilled:
        """Forward the prompt of each unit: consecutive rows of one group. `ids` and `lengths` are all prompts'."""
        device = lengths.device
        prompts = torch.tensor([unit[0] // group_size for unit in units], device=device)
        sizes = torch.tensor([len(unit) for unit in units], device=device)
        rows = torch.arange(units[0].start, units[-1].stop, device=device)
        prompt_of_row, lengths = torch.arange(len(units), device=device).repeat_interleave(sizes), lengths[prompts]
        hidden, prefix = prefill(policy, ids[prompts, : int(lengths.max())], lengths)
        return cls(rows, hidden[prompt_of_row], lengths[prompt_of_row], prefix, prompt_of_row)
