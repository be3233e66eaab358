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

MARGIN = "margin"  # TRL's name for the column that says by how much the chosen completion is better


class PreferenceData(CompletionData):
    """Pairs of completions; an example's completions are (chosen, rejected).

    If there is no prompt column, the prompt is the beginning that both texts share (`rlft/data/records.py`). Texts and
    conversations become ids as in `CompletionData`. A pair of equal completions cannot be used. The split is chosen by
    a hash of the prompt, so no prompt is in two splits.

    Arguments as for `CompletionData`, but with a column for each of the two completions.
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

    Raises `DataError` if only some pairs have a margin, or if one is not a finite number. All rows of a split have the
    same columns, so the first row shows whether there are margins to read.
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
    """Return the pairs' margins, or None if no pair has one.

    Raises `DataError` if only some pairs have a margin, or if one is not a finite number.
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
