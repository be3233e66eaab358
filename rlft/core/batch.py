"""What one optimizer step trains on, and how it is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlft.core.metrics import Metrics


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


@dataclass(frozen=True)
class Batch:
    """The rows to score and what their loss needs; everything that is indexed by row has B as its first dimension.

    `values` may hold `advantages` [B, T], `old_logprobs` [B, T], `ref_logprobs` [B, T], … A row's prompt index never
    decreases along the batch, so that a slice of rows needs a slice of prompts. `rows_per_unit` consecutive rows belong
    together (2 for pairs): no cut divides them.
    """

    rows: Rows
    values: dict[str, Tensor] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    samples: list[dict] = field(default_factory=list)
    rows_per_unit: int = 1
    num_read: int | None = None  # tokens read, for a loss that does not count completion tokens
    index: int = 0  # the batch's number in the run
    coefs: dict[str, float] = field(default_factory=dict)  # of the loss's terms, the same for all updates on the batch
    trained: Batch | None = None  # the rows to train on; None: all

    @property
    def num_rows(self) -> int:
        return len(self.rows.completion_ids)

    @property
    def num_tokens(self) -> int:
        """Completion tokens that count, or those that were read."""
        return int(self.rows.completion_mask.sum()) if self.num_read is None else self.num_read

    def slice(self, start: int, stop: int) -> Batch:
        """Return rows `start .. stop - 1` with their prompts, padding cut to the longest prompt and completion here."""
        rows = self.rows
        prompt_of_row = rows.prompt_of_row[start:stop]
        first, last = int(prompt_of_row[0]), int(prompt_of_row[-1])
        lengths = rows.prompt_lengths[first : last + 1]
        mask = rows.completion_mask[start:stop]
        used = mask.any(dim=0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 1
        cut = Rows(
            prompt_ids=rows.prompt_ids[first : last + 1, : int(lengths.max())],
            prompt_lengths=lengths,
            prompt_of_row=prompt_of_row - first,
            completion_ids=rows.completion_ids[start:stop, :width],
            completion_mask=mask[:, :width],
        )
        values = {k: v[start:stop, :width] if v.dim() > 1 else v[start:stop] for k, v in self.values.items()}
        return Batch(cut, values, rows_per_unit=self.rows_per_unit, coefs=self.coefs)

    def by_length(self) -> Batch:
        """Return the same rows with those of like length next to each other, so that micro-batches hold little padding.

        Rows of one prompt, and those of one unit, stay together; a loss does not depend on the order.
        """
        rows, unit = self.rows, self.rows_per_unit
        prompts = rows.prompt_of_row.tolist()
        lengths = (rows.prompt_lengths[rows.prompt_of_row] + num_read(rows)).tolist()
        blocks: list[list[int]] = []
        for row in range(self.num_rows):
            if row and (row % unit or prompts[row] == prompts[row - 1]):
                blocks[-1].append(row)
            else:
                blocks.append([row])
        blocks.sort(key=lambda block: max(lengths[row] for row in block))
        moved = self._taken([row for block in blocks for row in block])
        return replace(moved, rows_per_unit=unit, num_read=self.num_read)

    def select(self, index: Tensor) -> Batch:
        """Return the rows of `index` (int64; those of a prompt next to each other) with their prompts."""
        return self._taken(index.tolist())

    def _taken(self, rows: list[int]) -> Batch:
        """Return these rows in their order, each prompt where its first row is."""
        own, prompts = self.rows, self.rows.prompt_of_row.tolist()
        kept = list(dict.fromkeys(prompts[row] for row in rows))
        number = {prompt: i for i, prompt in enumerate(kept)}
        taken = Rows(
            prompt_ids=own.prompt_ids[kept],
            prompt_lengths=own.prompt_lengths[kept],
            prompt_of_row=torch.tensor([number[prompts[row]] for row in rows], device=own.prompt_of_row.device),
            completion_ids=own.completion_ids[rows],
            completion_mask=own.completion_mask[rows],
        )
        return Batch(taken, {name: value[rows] for name, value in self.values.items()}, coefs=self.coefs)

    def micro_batches(self, *, max_rows: int | None = None, max_tokens: int | None = None) -> Iterator[Batch]:
        """Cut into consecutive micro-batches of at most `max_rows` rows and `max_tokens` padded tokens each.

        Padded tokens are rows times (longest prompt + longest completion, up to its last counted token). A unit of
        `rows_per_unit` rows that is larger forms a micro-batch of its own.
        """
        mask, unit = self.rows.completion_mask, self.rows_per_unit
        prompt_lengths = self.rows.prompt_lengths[self.rows.prompt_of_row].tolist()
        completion_lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1).tolist()
        start, prompt, completion = 0, 0, 1  # the longest since `start`
        for row in range(0, self.num_rows, unit):
            p, c = max(prompt_lengths[row : row + unit]), max(1, *completion_lengths[row : row + unit])
            prompt, completion, count = max(prompt, p), max(completion, c), row + unit - start
            is_full = (max_rows is not None and count > max_rows) or (
                max_tokens is not None and count * (prompt + completion) > max_tokens
            )
            if is_full and row > start:
                yield self.slice(start, row)
                start, prompt, completion = row, p, c
        yield self.slice(start, self.num_rows)


@dataclass(frozen=True)
class Denominators:
    """The denominators of a loss: counts over the whole optimizer batch, all micro-batches and ranks."""

    num_tokens: float
    num_sequences: float


def pad(rows: list[list[int]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad token ids with 0 (masks say what counts): returns ids `[B, T]` int64 and mask `[B, T]` bool, T >= 1."""
    lengths = torch.tensor([len(row) for row in rows])
    width = max(1, int(lengths.max()))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    mask = torch.arange(width)[None] < lengths[:, None]
    return ids.to(device), mask.to(device)


def num_read(rows: Rows) -> Tensor:
    """Return how many tokens of each completion are read, `[B]`: the last counted token is predicted and not read."""
    mask = rows.completion_mask
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)
    return (ends - 1).clamp(min=0)
