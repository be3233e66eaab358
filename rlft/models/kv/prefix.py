"""The keys and values of prompts, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.models.kv.base import Cache, prompt_slots


class PrefixCache(Cache):
    """The keys and values of P prompts, recorded by one causal forward over `[P, S]`.

    `expand` gives each completion row its prompt's keys and values, so that a prompt is forwarded once for its whole
    group. Gradients flow back through the expansion: the sum over a group's rows is the exact gradient.
    """

    def __init__(self, lengths: Tensor) -> None:
        super().__init__()
        self.lengths = lengths  # [P] int64, tokens in each prompt
        self.keys: list[Tensor] = []  # each [P, H, S, D]
        self.values: list[Tensor] = []

    def mask(self, num_new: int) -> None:
        return None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        return keys, values

    def expand(self, prompt_of_row: Tensor) -> ExpandedPrefix:
        return ExpandedPrefix(self, prompt_of_row)


class ExpandedPrefix(Cache):
    """A prefix as B completions read it in one forward over all their tokens; row b continues `prompt_of_row[b]`."""

    def __init__(self, prefix: PrefixCache, prompt_of_row: Tensor) -> None:
        super().__init__()
        self.prefix, self.prompt_of_row = prefix, prompt_of_row
        self.used = prefix.keys[0].shape[2]

    def mask(self, num_new: int) -> Tensor:
        lengths, device = self.prefix.lengths[self.prompt_of_row], self.prompt_of_row.device
        visible = prompt_slots(lengths, self.used)[:, None, None, :].expand(-1, 1, num_new, -1)
        causal = torch.ones(num_new, num_new, dtype=torch.bool, device=device).tril()
        return torch.cat([visible, causal.expand(len(lengths), 1, -1, -1)], dim=3)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.prompt_of_row
        keys = torch.cat([self.prefix.keys[layer].index_select(0, rows), keys], dim=2)
        return keys, torch.cat([self.prefix.values[layer].index_select(0, rows), values], dim=2)
