"""Key/value caches: what rollout writes in place, and what an update differentiates through.

All lay a row out as `[prompt slots | completion slots]`. All rows put their next token into the same slot, so a step
writes one contiguous slice. Prompts shorter than the longest leave a gap of unused slots, and rows that join later do
not fill the slots before they came: the mask hides these. Positions are given to the model, so a gap moves no token
(right padding only: no row's positions start late).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.models.attention import Segments
from rlft.models.base import CacheShape


class ExtendedCache(ABC):
    """A cache whose attention is the plain one over what `extend` returns, under `mask`."""

    segments: Segments | None = None

    def __init__(self) -> None:
        self.used = 0
        self._mask: Tensor | None = None

    @abstractmethod
    def mask(self, num_new: int) -> Tensor | None:
        """As `Cache.mask`."""

    @abstractmethod
    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `Cache.extend`."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        if layer == 0:
            self._mask = self.mask(queries.shape[2])
        keys, values = self.extend(layer, keys, values)
        is_causal = self._mask is None and queries.shape[2] > 1
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self._mask, dropout_p=dropout, is_causal=is_causal
        )


class PrefixCache(ExtendedCache):
    """The keys and values of P prompts, recorded by one causal forward over `[P, S]`; differentiable.

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


class ExpandedPrefix(ExtendedCache):
    """A prefix as B completion rows see it in one forward over all their tokens (row b continues prompt_of_row[b])."""

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


class DecodeCache(ExtendedCache):
    """A preallocated cache for token-by-token decoding of B rows; written in place, without gradients.

    Memory: 2 * layers * B * H * (S + max_new_tokens) * D elements; with joined rows up to 2 max_new_tokens.
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
        self.starts = torch.zeros_like(self.lengths)  # [B], the completion slot that a row's first token is in
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

    def keep(self, rows: Tensor) -> None:
        """Compact: keep `rows` (int64 indices) and drop the others, whose sequences are finished."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.lengths, self.starts = self.lengths.index_select(0, rows), self.starts.index_select(0, rows)
        if self.visible is not None:
            self.visible = self.visible.index_select(0, rows)

    def join(self, prefix: PrefixCache, prompt_of_row: Tensor) -> None:
        """Let further rows begin behind those that are here, as many new tokens long at most."""
        shift = int(self.starts.min()) if len(self.starts) else self.used - self.num_slots
        old, num_slots = self.num_slots, max(self.num_slots, prefix.keys[0].shape[2])
        done = self.used - old - shift  # completion slots that stay
        for own, new in ((self.keys, prefix.keys), (self.values, prefix.values)):
            for layer, (mine, prompts) in enumerate(zip(own, new, strict=True)):
                B, H, _, D = mine.shape
                size = (B + len(prompt_of_row), H, num_slots + done + self.max_new_tokens, D)
                joined = mine.new_zeros(size)  # nothing may be nan where the mask hides it
                joined[:B, :, :old] = mine[:, :, :old]
                joined[:B, :, num_slots : num_slots + done] = mine[:, :, old + shift : self.used]
                joined[B:, :, : prompts.shape[2]] = prompts.index_select(0, prompt_of_row)
                own[layer] = joined
        self.lengths = torch.cat([self.lengths, prefix.lengths[prompt_of_row]])
        self.starts = torch.cat([self.starts - shift, self.starts.new_full((len(prompt_of_row),), done)])
        self.num_slots, self.used = num_slots, num_slots + done
        self.visible = self._visible()

    def _visible(self) -> Tensor | None:
        """Return bool `[B, slots]`, or None where no prompt leaves a gap and all rows began at once."""
        if bool((self.lengths == self.num_slots).all() & (self.starts == 0).all()):
            return None
        new = torch.arange(self.keys[0].shape[2] - self.num_slots, device=self.starts.device)
        return torch.cat([prompt_slots(self.lengths, self.num_slots), new >= self.starts[:, None]], dim=1)


def prompt_slots(lengths: Tensor, num_slots: int) -> Tensor:
    """Return bool `[B, S]`, True in the slots that a row's prompt fills."""
    return torch.arange(num_slots, device=lengths.device)[None] < lengths[:, None]
