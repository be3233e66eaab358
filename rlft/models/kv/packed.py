"""Caches of packed tokens, `[prompts | completions]` as one row, which only attention spreads out into rows."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.core.batch import Rows, num_read
from rlft.cpu.attention import Segments
from rlft.models.kv.base import prompt_slots
from rlft.models.kv.prefix import ExpandedPrefix, PrefixCache

WORTH_LEAVING = 0.9  # share of the tokens that predict something, from which the last layer runs on all


class Packing:
    """R right-padded rows of L places, of which `lengths` [R] are filled, and the N tokens in them, row after row."""

    def __init__(self, lengths: Tensor, num_places: int) -> None:
        self.shape = (len(lengths), num_places)
        mask = prompt_slots(lengths, num_places)
        self.places = None if bool(mask.all()) else mask.flatten().nonzero()[:, 0]  # [N]; None where all are filled
        self.num_tokens = len(lengths) * num_places if self.places is None else len(self.places)
        self.lengths, self.starts = lengths, lengths.cumsum(0) - lengths  # [R], of each row among the tokens
        self.ends = self.starts + lengths - 1  # [R], a row's last token

    def segments(self, *, behind: int = 0) -> Tensor:
        """Each row's first token, where so many tokens come before, and number of tokens, int64 `[R, 2]`."""
        return torch.stack([self.starts + behind, self.lengths], dim=1)

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
        """Turn `spread` back: `[R, H, L, D]` to `[1, H, N, D]`."""
        return self.pack(x.transpose(1, 2)).transpose(0, 1)[None]


class PackedPrefix(PrefixCache):
    """A `PrefixCache` of P prompts that are forwarded as one packed row."""

    def __init__(self, lengths: Tensor, *, num_slots: int) -> None:
        super().__init__(lengths)
        self.packing = Packing(lengths, num_slots)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        queries, keys, values = (self.packing.spread(x) for x in (queries, keys, values))
        return self.packing.gather(super().attend(layer, queries, keys, values, dropout=dropout))


class PackedRows:
    """P prompts and B completions as one row of N tokens, `[prompts | completions]`."""

    used = 0

    def __init__(self, rows: Rows) -> None:
        self.prompt_of_row = rows.prompt_of_row
        self.prefix = PackedPrefix(rows.prompt_lengths, num_slots=rows.prompt_ids.shape[1])
        self.completions, device = Packing(num_read(rows), rows.completion_ids.shape[1] - 1), rows.completion_ids.device
        prompts, completions = self.prefix.packing, self.completions
        self.ids = torch.cat([prompts.pack(rows.prompt_ids), completions.pack(rows.completion_ids[:, :-1])])
        firsts = rows.prompt_lengths[rows.prompt_of_row, None].expand(completions.shape)
        self.positions = torch.cat([prompts.positions, completions.pack(firsts) + completions.positions])
        behind = completions.starts[:, None] + torch.arange(completions.shape[1], device=device)
        first = prompts.ends[rows.prompt_of_row, None]
        before = torch.cat([first, prompts.num_tokens + behind], dim=1)  # [B, T], of the token before each
        self.outputs, self.before = _outputs(before[rows.completion_mask], len(self.ids))
        self.segments = Segments.of(
            prompts.segments(), completions.segments(behind=prompts.num_tokens), rows.prompt_of_row
        )
        self.expanded: ExpandedPrefix | None = None

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        sizes = [self.prefix.packing.num_tokens, self.completions.num_tokens]
        (q, own_q), (k, own_k), (v, own_v) = (x.split(sizes, dim=2) for x in (queries, keys, values))
        of_prompts = self.prefix.attend(layer, q, k, v, dropout=dropout)
        if sizes[1] == 0:
            return of_prompts
        own_q, own_k, own_v = (self.completions.spread(x) for x in (own_q, own_k, own_v))
        if self.expanded is None:
            self.expanded = self.prefix.expand(self.prompt_of_row)
        of_completions = self.expanded.attend(layer, own_q, own_k, own_v, dropout=dropout)
        return torch.cat([of_prompts, self.completions.gather(of_completions)], dim=2)


class UnsharedRows(PackedPrefix):
    """Rows of which no two share a prompt, `[prompt, completion]` after `[prompt, completion]`: causal attention."""

    def __init__(self, rows: Rows) -> None:
        read, prompt_lengths = num_read(rows), rows.prompt_lengths[:, None]
        S, T = rows.prompt_ids.shape[1], rows.completion_ids.shape[1]
        super().__init__(rows.prompt_lengths + read, num_slots=int((rows.prompt_lengths + read).max()))
        place = torch.arange(self.packing.shape[1], device=read.device).expand(self.packing.shape)
        of_prompt = rows.prompt_ids.gather(1, place.clamp(max=S - 1))
        of_completion = rows.completion_ids.gather(1, (place - prompt_lengths).clamp(min=0, max=T - 1))
        self.ids = self.packing.pack(torch.where(place < prompt_lengths, of_prompt, of_completion))
        alone = self.packing.segments()
        self.segments = Segments.of(alone, alone[:0], rows.prompt_of_row[:0])
        self.positions = self.packing.positions
        before = self.packing.starts[:, None] + prompt_lengths - 1 + torch.arange(T, device=read.device)  # [B, T]
        self.outputs, self.before = _outputs(before[rows.completion_mask], len(self.ids))


def _outputs(before: Tensor, num_tokens: int) -> tuple[Tensor | None, Tensor]:
    """Return the tokens that something is predicted from [M], and which of the M each of `before` [N] is.

    Where most tokens are among them it is None, for all: leaving out a few costs more than it saves.
    """
    outputs, places = before.unique(return_inverse=True)
    return (outputs, places) if len(outputs) < WORTH_LEAVING * num_tokens else (None, before)


def is_unshared(rows: Rows) -> bool:
    B, device = len(rows.completion_ids), rows.prompt_of_row.device
    return len(rows.prompt_ids) == B and torch.equal(rows.prompt_of_row, torch.arange(B, device=device))
