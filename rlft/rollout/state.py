"""What a rollout's rows have drawn so far, and how each draws its next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.models.kv.copied import DecodeCache
from rlft.models.kv.prefix import PrefixCache
from rlft.models.kv.shared import SharedDecodeCache
from rlft.models.kv.static import StaticCache
from rlft.rollout.sampling import Sampling, filtered, sample


class RolloutState:
    """What B rows have drawn so far. The last column of `ids` and `logprobs` takes what finished rows go on drawing."""

    def __init__(
        self,
        room: Tensor,
        draws: Tensor | None,
        *,
        max_new: int,
        sampling: Sampling,
        eos_id: int | None,
        dtype: torch.dtype,
    ) -> None:
        self.draws, self.max_new, self.sampling, self.eos_id = draws, max_new, sampling, eos_id
        self.limit = room.clamp(max=max_new)  # [B] tokens that a row may have
        self.ends_early = eos_id is not None or bool((room < max_new).any())
        self.ids = room.new_zeros(len(room), max_new + 1)
        self.logprobs = torch.zeros(
            len(room), max_new + 1, dtype=torch.promote_types(dtype, torch.float32), device=room.device
        )
        self.counts = torch.zeros_like(room)
        self.stopped = torch.zeros_like(room, dtype=torch.bool)

    def draw(self, logits: Tensor, rows: Tensor, done: Tensor) -> Tensor:
        """Draw the next tokens [A] of `rows` [A], which have `done` [A] tokens, from logits [A, V]."""
        place = done.clamp(max=self.max_new - 1)
        uniform = None if self.draws is None else self.draws[rows, place]
        token, logprob = _choose(logits, uniform, done, self.sampling, self.eos_id)
        is_open = self.is_open(rows, done)
        place = torch.where(is_open, done, self.max_new)
        self.ids[rows, place] = token
        self.logprobs[rows, place] = logprob
        self.counts[rows] += is_open
        if self.eos_id is not None:
            self.stopped[rows] |= is_open & (token == self.eos_id)
        return token

    def is_open(self, rows: Tensor, done: Tensor) -> Tensor:
        return ~self.stopped[rows] & (done < self.limit[rows])


def _choose(
    logits: Tensor, draw: Tensor | None, done: Tensor, sampling: Sampling, eos_id: int | None
) -> tuple[Tensor, Tensor]:
    if sampling.min_new_tokens and eos_id is not None:
        logits[:, eos_id] = logits[:, eos_id].masked_fill(done < sampling.min_new_tokens, -torch.inf)
    logits = filtered(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    if draw is not None:
        return sample(logits, draw)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    token = logits.argmax(dim=-1)
    return token, logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]


@dataclass
class Active:
    """Rows that decode together, A of them."""

    rows: Tensor  # [A] their numbers
    done: Tensor  # [A] tokens that each has drawn
    position: Tensor  # [A] of each one's next token
    hidden: Tensor  # [A, C] that predicts it
    cache: DecodeCache | SharedDecodeCache | StaticCache | None  # None: one new token follows from the prompt
    prefix: PrefixCache
    prompt_of_row: Tensor  # [A] in `prefix`
    is_mixed: bool = False  # whether some joined later than others

    def joined(self, other: Active) -> Active:
        assert isinstance(self.cache, DecodeCache | SharedDecodeCache)
        self.cache.join(other.prefix, other.prompt_of_row)
        rows, done = torch.cat([self.rows, other.rows]), torch.cat([self.done, other.done])
        position, hidden = torch.cat([self.position, other.position]), torch.cat([self.hidden, other.hidden])
        return Active(rows, done, position, hidden, self.cache, other.prefix, other.prompt_of_row, is_mixed=True)
