"""Continuous batching: rows that ended leave the running batch, and waiting rows are admitted to their places.

Batches change between steps and not between requests, as in Orca (Yu et al., OSDI 2022). This is the plain loop, for
every model and device that none of the faster decoders takes.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from rlft.models.base import CausalLM
from rlft.models.kv.copied import DecodeCache
from rlft.models.kv.shared import SharedDecodeCache
from rlft.rollout.state import Prefilled, RolloutState

KEEP_FRACTION = 0.75  # rows are compacted when fewer than this share of those in the cache still decode


class WaitingQueue:
    """The rows that have not begun, in units that begin together: a prompt's group, or `max_rows` of a larger one."""

    def __init__(self, num_prompts: int, *, group_size: int, max_rows: int | None) -> None:
        self.max_rows = num_prompts * group_size if max_rows is None else max_rows
        size = min(group_size, self.max_rows)
        groups = (range(p * group_size, (p + 1) * group_size) for p in range(num_prompts))
        self.units = deque(group[i : i + size] for group in groups for i in range(0, group_size, size))

    def take(self, num_running: int) -> list[range]:
        """Remove and return the units that fit beside so many running rows."""
        taken = list[range]()
        while self.units and num_running + len(self.units[0]) <= self.max_rows:
            num_running += len(self.units[0])
            taken.append(self.units.popleft())
        return taken

    @property
    def num_wanted(self) -> int:
        """How many rows must have ended before others are admitted; 0 where none wait."""
        return max(len(self.units[0]), int(self.max_rows * (1 - KEEP_FRACTION))) if self.units else 0


class RunningBatch:
    """Rows that decode together, A of them, one token a step."""

    def __init__(self, policy: CausalLM, new: Prefilled, *, max_new: int) -> None:
        self.policy, self.head = policy, policy.head_weight.to(new.hidden.dtype).t()
        self.rows, self.done = new.rows, torch.zeros_like(new.rows)  # [A] their numbers, and tokens drawn by each
        self.hidden, self.position = new.hidden, new.position  # [A, C] predicts the next token, [A] of that token
        self.is_mixed = False  # whether some rows were admitted later than others
        is_shared = policy.takes_packed and len(new.rows) > len(new.prefix.lengths)
        cache_type: type[DecodeCache | SharedDecodeCache] = SharedDecodeCache if is_shared else DecodeCache
        self.cache: DecodeCache | SharedDecodeCache | None = None  # for one new token the prompt's states are enough
        if max_new > 1:
            self.cache = cache_type(new.prefix, new.prompt_of_row, max_new_tokens=max_new, shape=policy.cache_shape)

    def admit(self, new: Prefilled) -> RunningBatch:
        """Let further rows begin beside those that are here."""
        assert self.cache is not None
        self.cache.admit(new.prefix, new.prompt_of_row)
        self.rows, self.done = torch.cat([self.rows, new.rows]), torch.cat([self.done, torch.zeros_like(new.rows)])
        self.hidden, self.position = torch.cat([self.hidden, new.hidden]), torch.cat([self.position, new.position])
        self.is_mixed = True
        return self

    def decode(self, state: RolloutState, *, until_free: int, check_every: int) -> RunningBatch | None:
        """Decode until `until_free` rows have ended (0: all of them); return the batch, or None if no row is left."""
        can_end, num_rows = state.ends_early or self.is_mixed, len(self.rows)
        for step in range(1, state.max_new + 1):
            token, has_places = self.draw(state), False
            if step == state.max_new:
                break
            if can_end and step % check_every == 0:
                is_open = state.is_open(self.rows, self.done)
                num_open = int(is_open.sum())
                if num_open == 0:
                    break
                has_places = 0 < until_free <= num_rows - num_open
                if has_places or num_open < KEEP_FRACTION * len(self.rows):
                    kept = is_open.nonzero()[:, 0]
                    token = token[kept]
                    self._compact(kept)
            self.read(token)
            if has_places:
                return self
        return None

    def draw(self, state: RolloutState) -> Tensor:
        """Draw each row's next token, `[A]`."""
        token = state.draw(self.hidden @ self.head, self.rows, self.done)
        self.done = self.done + 1
        return token

    def read(self, token: Tensor) -> None:
        """Forward the tokens `[A]` that were just drawn."""
        # A finished row that is still in the cache goes on at its last position; what it draws is not kept.
        place = self.position.clamp(max=self.policy.context_length - 1)
        self.hidden = self.policy(token[:, None], positions=place[:, None], cache=self.cache)[:, 0]
        self.position = self.position + 1

    def _compact(self, kept: Tensor) -> None:
        assert self.cache is not None
        self.cache.compact(kept)
        self.rows, self.done, self.position = self.rows[kept], self.done[kept], self.position[kept]
