"""A cache of packed tokens, several sequences as one row: only attention spreads them out into rows of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.models.kv.base import AttentionCache, Cache, prompt_slots
from rlft.models.kv.prefix import ExpandedPrefix, PrefixCache


class Packing:
    """R right-padded rows of L places, of which `lengths` [R] are filled, and the N tokens in them, row after row."""

    def __init__(self, lengths: Tensor, num_places: int) -> None:
        self.shape = (len(lengths), num_places)
        mask = prompt_slots(lengths, num_places)
        self.places = None if bool(mask.all()) else mask.flatten().nonzero()[:, 0]  # [N]; None where all are filled
        self.num_tokens = len(lengths) * num_places if self.places is None else len(self.places)
        self.lengths, self.starts = lengths, lengths.cumsum(0) - lengths  # [R], of each row among the tokens
        self.ends = self.starts + lengths - 1  # [R], a row's last token

    def segments(self, *, num_before: int = 0) -> Tensor:
        """Each row's first token and number of tokens, int64 `[R, 2]`, where so many other tokens come first."""
        return torch.stack([self.starts + num_before, self.lengths], dim=1)

    @property
    def positions(self) -> Tensor:
        """Each token's place in its row, int64 `[N]`."""
        return self.pack(torch.arange(self.shape[1], device=self.starts.device).expand(self.shape))

    def pack(self, x: Tensor) -> Tensor:
        """Take what is filled: `[R, L, ...]` to `[N, ...]`."""
        x = x.reshape(-1, *x.shape[2:])
        return x if self.places is None else x.index_select(0, self.places)

    def spread(self, x: Tensor) -> Tensor:
        """Put tokens `[1, H, N, D]`, as attention has them, into their rows: `[R, H, L, D]`, 0 where none is."""
        _, H, _, D = x.shape
        x = x[0].transpose(0, 1)
        if self.places is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], H, D).index_copy(0, self.places, x)
        return x.reshape(*self.shape, H, D).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`: `[R, H, L, D]` to `[1, H, N, D]`."""
        return self.pack(x.transpose(1, 2)).transpose(0, 1)[None]


class PackedCache(AttentionCache):
    """P contexts, and B rows of which each continues one, as one row of N tokens, `[contexts | rows]`.

    `prefix` has the contexts' keys and values afterwards, unless attention went by `segments`.
    """

    def __init__(self, contexts: Packing, rows: Packing | None = None, context_of_row: Tensor | None = None) -> None:
        self.contexts, self.rows, self.context_of_row = contexts, rows, context_of_row
        self.prefix = PrefixCache(contexts.lengths)
        self.expanded: ExpandedPrefix | None = None

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        qkv = (queries, keys, values)
        if self.rows is None or self.rows.num_tokens == 0:
            return _attend_in_rows(self.contexts, self.prefix, layer, qkv, dropout)
        sizes = [self.contexts.num_tokens, self.rows.num_tokens]
        of_contexts, of_rows = zip(*(x.split(sizes, dim=2) for x in qkv), strict=True)
        in_contexts = _attend_in_rows(self.contexts, self.prefix, layer, of_contexts, dropout)
        if self.expanded is None:
            assert self.context_of_row is not None
            self.expanded = self.prefix.expand(self.context_of_row)
        return torch.cat([in_contexts, _attend_in_rows(self.rows, self.expanded, layer, of_rows, dropout)], dim=2)


def _attend_in_rows(packing: Packing, cache: Cache, layer: int, qkv: tuple[Tensor, ...], dropout: float) -> Tensor:
    queries, keys, values = (packing.spread(x) for x in qkv)
    return packing.gather(cache.attend(layer, queries, keys, values, dropout=dropout))
