"""Prompts and completions as a model reads them: padded, or packed one after the other without padding.

Everything in a transformer but attention treats tokens one by one, and that is nine tenths of its arithmetic. So a
model that leaves attention to its cache (`CausalLM.takes_packed`) reads P prompts and B completions as one row of N
tokens, `[prompts | completions]`, and only attention spreads them out into rows, unless it is compiled
(`rlft.models.attention`). Each prompt stands there once for its whole group: its completions attend to its keys and
values, and gradients flow back through them, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.errors import ConfigError
from rlft.models.attention import Segments
from rlft.models.base import CausalLM
from rlft.rollout.cache import ExpandedPrefix, PrefixCache, prompt_slots

WORTH_LEAVING = 0.9  # share of the tokens that predict something, from which the last layer runs on all


@dataclass(frozen=True)
class Rows:
    """B completions of P prompts, both right-padded; several rows may share a prompt."""

    prompt_ids: Tensor  # [P, S] int64
    prompt_lengths: Tensor  # [P] int64, at least 1
    prompt_of_row: Tensor  # [B] int64
    completion_ids: Tensor  # [B, T] int64
    completion_mask: Tensor  # [B, T] bool, True where a token counts (the end token does, what follows does not)

    def to(self, device: torch.device) -> Rows:
        return Rows(**{name: value.to(device) for name, value in vars(self).items()})


def predictors(policy: CausalLM, rows: Rows) -> Tensor:
    """Return `[N, C]`: the hidden states that predict the N counted completion tokens, row by row."""
    if policy.mask_id is not None:
        raise ConfigError(
            "a bidirectional model has no next-token probabilities: train it with algo=denoise, or set "
            "model.is_causal=true"
        )
    if not policy.takes_packed:
        return _padded_predictors(policy, rows)[rows.completion_mask]
    packed = _Unshared(rows) if _is_unshared(rows) else PackedRows(rows)
    hidden = policy(packed.ids[None], positions=packed.positions[None], cache=packed, outputs=packed.outputs)
    return hidden.squeeze(0).index_select(0, packed.before)  # `hidden[0]` would copy its gradient


def prefill(policy: CausalLM, prompt_ids: Tensor, lengths: Tensor) -> tuple[Tensor, PrefixCache]:
    """Forward prompts `[P, S]`; return the last hidden state of each, `[P, C]`, and their keys and values."""
    if not policy.takes_packed:
        prefix = PrefixCache(lengths)
        hidden = policy(prompt_ids, cache=prefix)
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1], prefix
    packed = PackedPrefix(lengths, num_slots=prompt_ids.shape[1])
    ids, positions = packed.packing.pack(prompt_ids), packed.packing.positions
    return policy(ids[None], positions=positions[None], cache=packed, outputs=packed.packing.ends)[0], packed


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


class _Unshared(PackedPrefix):
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


def _is_unshared(rows: Rows) -> bool:
    B, device = len(rows.completion_ids), rows.prompt_of_row.device
    return len(rows.prompt_ids) == B and torch.equal(rows.prompt_of_row, torch.arange(B, device=device))


def num_read(rows: Rows) -> Tensor:
    """Return how many tokens of each completion are read, `[B]`: the last that counts is predicted, not read."""
    mask = rows.completion_mask
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)
    return (ends - 1).clamp(min=0)


def _padded_predictors(policy: CausalLM, rows: Rows) -> Tensor:
    """Return `[B, T, C]`, by a pass over the prompts and one over the completions, which a cache ties together."""
    num_slots, num_new = rows.prompt_ids.shape[1], rows.completion_ids.shape[1] - 1
    if num_slots == 1 and len(rows.prompt_ids) == len(rows.completion_ids):
        # One token of context for each row, none shared (plain text): a single causal pass over the whole row.
        first = rows.prompt_ids[rows.prompt_of_row]
        return policy(torch.cat([first, rows.completion_ids[:, :-1]], dim=1))
    last, prefix = prefill(policy, rows.prompt_ids, rows.prompt_lengths)
    first = last.index_select(0, rows.prompt_of_row)[:, None]
    if num_new == 0:
        return first
    positions = rows.prompt_lengths[rows.prompt_of_row, None] + torch.arange(num_new, device=last.device)
    # Padding after a completion's end would run past the last position; what it computes is never read.
    positions = positions.clamp(max=policy.context_length - 1)
    expanded = prefix.expand(rows.prompt_of_row)
    return torch.cat([first, policy(rows.completion_ids[:, :-1], positions=positions, cache=expanded)], dim=1)
