"""Key/value caches: one that rollout writes in place, and one that the update differentiates through.

Both lay a row out as `[prompt slots | completion slots]`. All rows put their t-th new token into the same slot, so a
step writes one contiguous slice; prompts shorter than the longest leave a gap of unused slots, which the mask hides.
Positions are given to the model, so a gap moves no token (right padding only: no row's positions start late).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.models.base import CacheShape


class PrefixCache:
    """The keys and values of P prompts, recorded by one causal forward over `[P, S]`; differentiable.

    `expand` gives each completion row its prompt's keys and values, so that a prompt is forwarded once for its whole
    group. Gradients flow back through the expansion: the sum over a group's rows is the exact gradient.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths  # [P] int64, tokens in each prompt
        self.used = 0
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


class ExpandedPrefix:
    """A prefix as B completion rows see it in one forward over all their tokens (row b continues prompt_of_row[b])."""

    def __init__(self, prefix: PrefixCache, prompt_of_row: Tensor) -> None:
        self.prefix, self.prompt_of_row = prefix, prompt_of_row
        self.used = prefix.keys[0].shape[2]

    def mask(self, num_new: int) -> Tensor:
        lengths, device = self.prefix.lengths[self.prompt_of_row], self.prompt_of_row.device
        visible = _prompt_slots(lengths, self.used)[:, None, None, :].expand(-1, 1, num_new, -1)
        causal = torch.ones(num_new, num_new, dtype=torch.bool, device=device).tril()
        return torch.cat([visible, causal.expand(len(lengths), 1, -1, -1)], dim=3)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.prompt_of_row
        keys = torch.cat([self.prefix.keys[layer].index_select(0, rows), keys], dim=2)
        return keys, torch.cat([self.prefix.values[layer].index_select(0, rows), values], dim=2)


class DecodeCache:
    """A preallocated cache for token-by-token decoding of B rows; written in place, without gradients.

    Memory: 2 * layers * B * H * (S + max_new_tokens) * D elements.
    """

    def __init__(self, prefix: PrefixCache, prompt_of_row: Tensor, *, max_new_tokens: int, shape: CacheShape) -> None:
        num_rows, num_slots = len(prompt_of_row), prefix.keys[0].shape[2]
        size = (num_rows, shape.num_kv_heads, num_slots + max_new_tokens, shape.head_dim)
        self.keys = [prefix.keys[0].new_empty(size) for _ in range(shape.num_layers)]
        self.values = [prefix.keys[0].new_empty(size) for _ in range(shape.num_layers)]
        for layer in range(shape.num_layers):
            self.keys[layer][:, :, :num_slots] = prefix.keys[layer].index_select(0, prompt_of_row)
            self.values[layer][:, :, :num_slots] = prefix.values[layer].index_select(0, prompt_of_row)
        lengths = prefix.lengths[prompt_of_row]
        self.used = num_slots
        self.visible: Tensor | None = None  # bool [B, S + max_new_tokens]; None where no prompt leaves a gap
        if bool((lengths < num_slots).any()):
            new = lengths.new_ones((num_rows, max_new_tokens), dtype=torch.bool)
            self.visible = torch.cat([_prompt_slots(lengths, num_slots), new], dim=1)

    def mask(self, num_new: int) -> Tensor | None:
        if num_new != 1:
            raise ValueError(f"decoding goes one token at a time, got {num_new}")
        return None if self.visible is None else self.visible[:, None, None, : self.used + 1]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self.used + 1
        self.keys[layer][:, :, self.used : end] = keys
        self.values[layer][:, :, self.used : end] = values
        if layer == len(self.keys) - 1:
            self.used = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Compact: keep `rows` (int64 indices) and drop the others, whose sequences are finished."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        if self.visible is not None:
            self.visible = self.visible.index_select(0, rows)


def _prompt_slots(lengths: Tensor, num_slots: int) -> Tensor:
    """Return bool `[B, S]`, True in the slots that a row's prompt fills."""
    return torch.arange(num_slots, device=lengths.device)[None] < lengths[:, None]
