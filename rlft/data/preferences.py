"""Preferences: a prompt with a chosen and a rejected completion, TRL's columns `prompt`, `chosen` and `rejected`."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from rlft.core.errors import DataError
from rlft.data.completions import CompletionData
from rlft.data.encode import Encoder
from rlft.data.examples import Example, Unusable
from rlft.data.kinds import Kind
from rlft.data.source import Source

MARGIN = "margin"  # TRL's name of the column that says by how much the chosen completion is better


class PreferenceData(CompletionData):
    """Pairs; the completions of an example are (chosen, rejected).

    Without a prompt column the prompt is what both texts share (`rlft/data/records.py`). Texts and conversations become
    ids as in `CompletionData`. A pair of equal completions says nothing and is refused or skipped like other rows that
    cannot be used. The split is by a hash of the prompt, so no prompt is in two splits.

    Arguments: as for `CompletionData`, with the columns of both completions.
    """

    kind = Kind.PREFERENCES
    reasons = ("too_long", "no_text", "equal")

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Encoder,
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        max_tokens: int | None = None,
        on_unusable: str = "error",
    ) -> None:
        super().__init__(source, tokenizer=tokenizer, max_tokens=max_tokens, on_unusable=on_unusable)
        self.columns = (chosen_column, rejected_column)

    def example(self, example: Example) -> Example | Unusable:
        chosen, rejected = example.completions
        if chosen == rejected:
            return Unusable("equal", f"{example.prompt.where}: the chosen and the rejected completion are equal")
        return example


def has_margins(data: PreferenceData) -> bool:
    """Return whether the pairs of the training and the validation split have margins.

    Raises `DataError` for a margin that is not a finite number, one that is missing among them. All rows of a source
    have the same columns, so that pairs without margins are not read for it.
    """
    splits = [data.examples(split) for split in ("train", "validation")]
    if not any(MARGIN in split[0].prompt.columns for split in splits if split):
        return False
    is_given = {example.prompt.columns.get(MARGIN) is not None for example in chain(*splits)}
    if True in is_given:
        for example in chain(*splits):
            _number(example.prompt.columns.get(MARGIN), example)
    return True in is_given


def margins(examples: list[Example]) -> list[float] | None:
    """Return the pairs' margins where the data has a column `margin`, else None.

    Raises `DataError` for a margin that is not a finite number, one that is missing among them.
    """
    values = [example.prompt.columns.get(MARGIN) for example in examples]
    if all(value is None for value in values):
        return None
    return [_number(value, example) for value, example in zip(values, examples, strict=True)]


def _number(value: Any, example: Example) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{example.prompt.where}: {MARGIN!r} is a number in every row or in none, got {value!r}")
    return number
