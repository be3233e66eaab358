"""Decoding with arrays of fixed sizes and addresses, as a CUDA graph needs them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.models.kv.base import AttentionCache, CacheShape, prompt_slots
from rlft.models.kv.prefix import PrefixCache

ALIGNMENT = 16  # torch's memory-efficient attention copies a mask whose rows do not begin at multiples of it


class StaticCache(AttentionCache):
    """Keys and values of B rows, each with a copy of its prompt's, for steps that take no number from the host.

    Memory: 2 * layers * B * H * (S + max_new_tokens) * D elements.
    """

    def __init__(self, prefix: PrefixCache, prompt_of_row: Tensor, *, max_new_tokens: int, shape: CacheShape) -> None:
        num_rows, self.used = len(prompt_of_row), prefix.keys[0].shape[2]
        self.num_slots = aligned(self.used + max_new_tokens)
        self.length = self.used  # slots that attention reads
        self.slot = torch.tensor([self.used], device=prompt_of_row.device)  # of the next token: `used` on the device
        # The rest is zeros: hidden slots must hold no NaN.
        rest = (0, 0, 0, self.num_slots - self.used)
        self.keys = [F.pad(keys.index_select(0, prompt_of_row), rest) for keys in prefix.keys]
        self.values = [F.pad(values.index_select(0, prompt_of_row), rest) for values in prefix.values]
        assert len(self.keys) == shape.num_layers
        # [B, 1, 1, slots], added to the scores, in the dtype of the queries (autocast's where it is on)
        self.bias = self.keys[0].new_full((num_rows, 1, 1, self.num_slots), -torch.inf)
        of_prompt = prompt_slots(prefix.lengths[prompt_of_row], self.used)
        self.bias[:, 0, 0, : self.used].masked_fill_(of_prompt, 0.0)

    @property
    def slot_bytes(self) -> int:
        """The memory of one slot in all rows and layers."""
        return 2 * len(self.keys) * self.keys[0][:, :, 0].numel() * self.keys[0].element_size()

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        if queries.shape[2] != 1:
            raise ValueError(f"decoding goes one token at a time, got {queries.shape[2]}")
        if layer == 0:
            self.bias.index_fill_(3, self.slot, 0.0)
        self.keys[layer].index_copy_(2, self.slot, keys)
        self.values[layer].index_copy_(2, self.slot, values)
        if layer == len(self.keys) - 1:
            self.slot += 1
        keys, values = self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.bias[..., : self.length], dropout_p=dropout
        )

    def compact(self, rows: Tensor) -> None:
        """Keep `rows` (int64 indices) and drop the others."""
        for own in (self.keys, self.values):
            for layer, whole in enumerate(own):  # one after the other: there are never two copies of everything
                own[layer] = whole.index_select(0, rows)
        self.bias = self.bias.index_select(0, rows)


def aligned(num_slots: int) -> int:
    """Round a number of slots up so that attention needs no copy of its mask."""
    return math.ceil(num_slots / ALIGNMENT) * ALIGNMENT
