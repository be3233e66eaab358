"""Decoding, for any model, in which each row has its own copy of its prompt's keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.models.kv.base import Cache, CacheShape, prompt_slots
from rlft.models.kv.prefix import PrefixCache


class DecodeCache(Cache):
    """A preallocated cache for token-by-token decoding of B rows; written in place, without gradients.

    Memory: 2 * layers * B * H * (S + max_new_tokens) * D elements; up to 2 max_new_tokens once rows were admitted.
    """

    def __init__(self, prefix: PrefixCache, prompt_of_row: Tensor, *, max_new_tokens: int, shape: CacheShape) -> None:
        super().__init__()
        num_rows, self.num_slots = len(prompt_of_row), prefix.keys[0].shape[2]  # the prompts' slots
        size = (num_rows, shape.num_kv_heads, self.num_slots + max_new_tokens, shape.head_dim)
        self.keys = [prefix.keys[0].new_empty(size) for _ in range(shape.num_layers)]
        self.values = [prefix.keys[0].new_empty(size) for _ in range(shape.num_layers)]
        for layer in range(shape.num_layers):
            self.keys[layer][:, :, : self.num_slots] = prefix.keys[layer].index_select(0, prompt_of_row)
            self.values[layer][:, :, : self.num_slots] = prefix.values[layer].index_select(0, prompt_of_row)
        self.lengths, self.max_new_tokens, self.used = prefix.lengths[prompt_of_row], max_new_tokens, self.num_slots
        self.starts = torch.zeros_like(self.lengths)  # [B], the completion slot of a row's first token
        self.visible = self._visible()

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

    def compact(self, rows: Tensor) -> None:
        """Keep `rows` (int64 indices) and drop the others, which have ended."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.lengths, self.starts = self.lengths.index_select(0, rows), self.starts.index_select(0, rows)
        if self.visible is not None:
            self.visible = self.visible.index_select(0, rows)

    def admit(self, prefix: PrefixCache, prompt_of_row: Tensor) -> None:
        """Add rows, which may have `max_new_tokens` tokens from the next slot on."""
        shift = int(self.starts.min()) if len(self.starts) else self.used - self.num_slots
        old, num_slots = self.num_slots, max(self.num_slots, prefix.keys[0].shape[2])
        done = self.used - old - shift  # completion slots that stay
        for own, new in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for layer, (mine, prompts) in enumerate(zip(own, new, strict=True)):
                B, H, _, D = mine.shape
                size = (B + len(prompt_of_row), H, num_slots + done + self.max_new_tokens, D)
                joined = mine.new_zeros(size)  # not empty: hidden slots must hold no NaN
                joined[:B, :, :old] = mine[:, :, :old]
                joined[:B, :, num_slots : num_slots + done] = mine[:, :, old + shift : self.used]
                joined[B:, :, : prompts.shape[2]] = prompts.index_select(0, prompt_of_row)
                own[layer] = joined
        self.lengths = torch.cat([self.lengths, prefix.lengths[prompt_of_row]])
        self.starts = torch.cat([self.starts - shift, self.starts.new_full((len(prompt_of_row),), done)])
        self.num_slots, self.used = num_slots, num_slots + done
        self.visible = self._visible()

    def _visible(self) -> Tensor | None:
        """Return which slots a row sees, bool `[B, slots]`; None where no prompt leaves a gap and all began at once."""
        if bool((self.lengths == self.num_slots).all() & (self.starts == 0).all()):
            return None
        new = torch.arange(self.keys[0].shape[2] - self.num_slots, device=self.starts.device)
        return torch.cat([prompt_slots(self.lengths, self.num_slots), new >= self.starts[:, None]], dim=1)
