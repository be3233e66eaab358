"""The contract between a model and a key/value cache. `__init__.py` beside this file lists the caches.

Decoding caches lay a row out as `[prompt slots | completion slots]`. All rows put their next token into the same slot,
so that a step writes one contiguous slice. Prompts shorter than the longest leave a gap of unused slots, and a row that
was admitted late leaves the slots before its first token empty: the mask hides both. The model is given positions, so
empty slots shift no token (rows are right-padded: no row's positions start late).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.cpu.attention import Segments


class AttentionCache(ABC):
    """What a model whose attention is ours (`CausalLM.takes_packed`) asks of a cache: attention itself.

    `segments` says which of the new tokens belong together, where the cache holds no others and its keys and values are
    not read afterwards: the model may then call `rlft.cpu.attention.attend` instead of `attend`.
    """

    segments: Segments | None = None

    @abstractmethod
    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Add a layer's new keys and values; return attention's result for the new queries; all `[B, H, new, D]`."""


class Cache(AttentionCache):
    """What a model with attention of its own asks of a cache: the keys and values of all tokens, and a mask.

    In each forward the model calls `mask` once, and then `extend` in each layer; `attend` does the same for ours.
    """

    def __init__(self) -> None:
        self.used = 0  # slots that earlier tokens fill, gaps among them; the same in every row
        self._mask: Tensor | None = None

    @abstractmethod
    def mask(self, num_new: int) -> Tensor | None:
        """Return what `num_new` new tokens may attend to: bool `[B or 1, 1, num_new, slots]`, True where they may.

        `None` means plain causal attention among the new tokens, or, for a single new token, to everything.
        """

    @abstractmethod
    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values `[B, H, num_new, D]`; return those of all slots, old and new."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        if layer == 0:
            self._mask = self.mask(queries.shape[2])
        keys, values = self.extend(layer, keys, values)
        is_causal = self._mask is None and queries.shape[2] > 1
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self._mask, dropout_p=dropout, is_causal=is_causal
        )


@dataclass(frozen=True)
class CacheShape:
    """What a preallocated cache must hold: layers, key/value heads, and the width of a head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def prompt_slots(lengths: Tensor, num_slots: int) -> Tensor:
    """Return bool `[B, S]`, True in the slots that a row's prompt fills."""
    return torch.arange(num_slots, device=lengths.device)[None] < lengths[:, None]
