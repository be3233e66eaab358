"""The contract between a model and a key/value cache, and what most caches have in common.

All lay a row out as `[prompt slots | completion slots]`. All rows put their next token into the same slot, so a step
writes one contiguous slice. Prompts shorter than the longest leave a gap of unused slots, and rows that join later do
not fill the slots before they came: the mask hides these. Positions are given to the model, so a gap moves no token
(right padding only: no row's positions start late).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.cpu.attention import Segments


class Cache(Protocol):
    """Keys and values of other tokens, as a model's attention layers meet them (`rlft/models/kv/cache.py`).

    A model of ours leaves attention to `attend`; one of another library asks for all keys and values by `extend`, and
    for what may be seen of them by `mask`. Where all tokens that are there are new, `segments` may say which belong
    together (on a CPU); attention then can do without `attend`.
    """

    segments: Segments | None
    used: int  # slots that earlier tokens fill, gaps among them; the same in every row

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Take a layer's new queries, keys and values `[B, H, num_new, D]`; return what attention gives, likewise."""

    def mask(self, num_new: int) -> Tensor | None:
        """Return what `num_new` new tokens may attend to: bool `[B or 1, 1, num_new, slots]`, True where they may.

        `None` means plain causal attention among the new tokens, or, for a single new token, everything there is.
        Called once for each forward, before any `extend`.
        """

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values `[B, H, num_new, D]`; return those of all slots, old and new."""


@dataclass(frozen=True)
class CacheShape:
    """What a preallocated cache must hold: layers, key/value heads, and the width of a head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class SlotCache(ABC):
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


def prompt_slots(lengths: Tensor, num_slots: int) -> Tensor:
    """Return bool `[B, S]`, True in the slots that a row's prompt fills."""
    return torch.arange(num_slots, device=lengths.device)[None] < lengths[:, None]
