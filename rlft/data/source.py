"""What a data set is made of: rows of text, each in exactly one of three splits.

The split of a text is a function of the text alone (a hash), so it depends neither on the order of the rows nor on
what else the file holds: a text added later moves no other text from train to test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlft.errors import ConfigError, nearest

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One text, its other columns (they are handed to the rewards), and its place as `"file:line"`.

    `messages` is set where the row was a conversation (a list of `{"role", "content"}`); `text` is then the text of
    its messages, and `PromptData` renders it through the tokenizer's chat template.
    """

    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    messages: tuple[dict[str, str], ...] | None = None


class Source(Protocol):
    """A data set that can be read split by split; `counts` says how many rows it has, dropped and kept."""

    @property
    def counts(self) -> dict[str, int]: ...

    def rows(self, split: str) -> list[Row]: ...


def check_split(split: str) -> str:
    """Return `split` if it is the name of one, else raise `ConfigError`."""
    if split not in SPLITS:
        raise ConfigError(f"split is one of {', '.join(SPLITS)}, got {split!r}{nearest(split, SPLITS)}")
    return split


def check_fractions(validation: float, test: float) -> None:
    """Raise `ConfigError` unless the two are fractions that leave something to train on."""
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ConfigError(
            f"validation and test are fractions of the rows, each at least 0 and together less than 1, "
            f"got validation={validation}, test={test}"
        )


def normalised(text: str) -> str:
    """Return the text with each run of white space as one space: two texts are the same where these are equal."""
    return " ".join(text.split())


def split_of(text: str, *, validation: float = 0.05, test: float = 0.05) -> str:
    """Return the split of a text: by the SHA-256 of its normalised form, read as a number in [0, 1)."""
    return _split_of_digest(_digest(text), validation, test)


def split_rows(
    rows: Iterable[Row],
    *,
    validation: float = 0.05,
    test: float = 0.05,
    key: Callable[[Row], Hashable] | None = None,
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Return the rows without duplicates by split, each split in the order of its hashes, and the counts.

    The order of the hashes mixes a file that is sorted (say by label), so that the first 200 rows of a split are a
    fair sample of it. Of duplicates the first is kept; `key` says what makes two rows the same (default: the
    normalised text). Counts: `duplicates`, and one for each split.
    """
    check_fractions(validation, test)
    rows = list(rows)
    digests = [_digest(row.text) for row in rows]
    keep = _firsts(digests if key is None else [key(row) for row in rows])
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for index in sorted(keep, key=digests.__getitem__):
        splits[_split_of_digest(digests[index], validation, test)].append(rows[index])
    return splits, {"duplicates": len(rows) - len(keep), **{name: len(splits[name]) for name in SPLITS}}


def given_splits(
    splits: dict[str, list[Row]], *, key: Callable[[Row], Hashable] | None = None
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Return splits that a user made, in their own order, without duplicates and with no text in two of them.

    A text that is in test leaves validation and train, one that is in validation leaves train, counted as `leaked`.
    """
    seen: set[bytes] = set()
    clean: dict[str, list[Row]] = {}
    counts = {"duplicates": 0, "leaked": 0}
    for name in reversed(SPLITS):
        rows = splits.get(name, [])
        digests = [_digest(row.text) for row in rows]
        keep = _firsts(digests if key is None else [key(row) for row in rows])
        clean[name] = [rows[index] for index in keep if digests[index] not in seen]
        counts["duplicates"] += len(rows) - len(keep)
        counts["leaked"] += len(keep) - len(clean[name])
        seen.update(digests)
    return clean, {**counts, **{name: len(clean[name]) for name in SPLITS}}


def _firsts(marks: Iterable[Hashable]) -> list[int]:
    """Return the index of the first of each set of equal marks, ascending."""
    first: dict[Hashable, int] = {}
    for index, mark in enumerate(marks):
        first.setdefault(mark, index)
    return list(first.values())


def _digest(text: str) -> bytes:
    return hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).digest()


def _split_of_digest(digest: bytes, validation: float, test: float) -> str:
    number = int.from_bytes(digest[:8], "big") / 2**64
    if number < test:
        return "test"
    return "validation" if number < test + validation else "train"
