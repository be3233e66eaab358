"""What one optimizer step trains on, and how it is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlft.models.scorer import Rows
from rlft.trainer.metrics import Means


@dataclass(frozen=True)
class Batch:
    """The rows to score and what their loss needs; everything that is indexed by row has B as its first dimension.

    `values` may hold `advantages` [B, T], `old_logprobs` [B, T], `ref_logprobs` [B, T], … A row's prompt index never
    decreases along the batch, so that a slice of rows needs a slice of prompts.
    """

    rows: Rows
    values: dict[str, Tensor] = field(default_factory=dict)
    means: Means = field(default_factory=Means)
    samples: list[dict] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.rows.completion_ids)

    @property
    def num_tokens(self) -> int:
        """Completion tokens that count."""
        return int(self.rows.completion_mask.sum())

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
        return Batch(cut, values)

    def select(self, index: Tensor) -> Batch:
        """Return the rows of `index` (int64, ascending) with all prompts."""
        r = self.rows
        rows = Rows(
            r.prompt_ids, r.prompt_lengths, r.prompt_of_row[index], r.completion_ids[index], r.completion_mask[index]
        )
        return Batch(rows, {name: value[index] for name, value in self.values.items()})

    def micro_batches(self, *, max_rows: int | None = None, max_tokens: int | None = None) -> Iterator[Batch]:
        """Cut into consecutive micro-batches of at most `max_rows` rows and `max_tokens` padded tokens each.

        Padded tokens are rows times (longest prompt + longest completion). A row longer than `max_tokens` forms a
        micro-batch of its own.
        """
        prompt_lengths = self.rows.prompt_lengths[self.rows.prompt_of_row].tolist()
        completion_lengths = self.rows.completion_mask.sum(dim=1).clamp(min=1).tolist()
        start, prompt, completion = 0, 0, 0  # the longest since `start`
        for row, (p, c) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
            prompt, completion, count = max(prompt, p), max(completion, c), row - start + 1
            is_full = (max_rows is not None and count > max_rows) or (
                max_tokens is not None and count * (prompt + completion) > max_tokens
            )
            if is_full and row > start:
                yield self.slice(start, row)
                start, prompt, completion = row, p, c
        yield self.slice(start, self.num_rows)


def pad(rows: list[list[int]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad token ids with 0 (masks say what counts): returns ids `[B, T]` int64 and mask `[B, T]` bool, T >= 1."""
    lengths = torch.tensor([len(row) for row in rows])
    width = max(1, int(lengths.max()))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    mask = torch.arange(width)[None] < lengths[:, None]
    return ids.to(device), mask.to(device)
