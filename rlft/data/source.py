"""Sources: rows of text, each in exactly one of three splits.

The split of a text is a function of the text alone (a hash). It depends neither on the order of the rows nor on what
else the file holds, so a text that is added later moves no other text from train to test. The hash is of the text with
each run of white space replaced by one space: texts that differ only in white space are always in the same split. They
count as duplicates only if they are equal.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlft.core.errors import ConfigError, check_choice

SPLITS = ("train", "validation", "test")
HASH_BYTES = 32  # of SHA-256


@dataclass(frozen=True)
class Row:
    """One text, its other columns (which the rewards receive), and its place as `"file:line"`.

    `messages` is set if the row was a conversation (a list of `{"role", "content"}`). `text` then joins the texts of
    the messages, and `PromptData` renders the conversation through the tokenizer's chat template.
    """

    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    messages: tuple[dict[str, str], ...] | None = None


class Source(Protocol):
    """A data set that is read split by split; `counts` says how many rows were kept and how many were left out.

    A source may also have a `key` (`rlft.core.cache_dir.Keyed`). What is made from its rows is then cached on disk. A
    class whose rows always have the same columns names them in the tuple `columns`. A data set that needs another
    column is then refused before anything is read.
    """

    @property
    def counts(self) -> dict[str, int]: ...

    def rows(self, split: str) -> Sequence[Row]: ...


class SplitSource(ABC):
    """Base of rlft's own sources, which read all rows at the first use."""

    validation: float  # fraction of the texts that is held out for evaluation

    @abstractmethod
    def read_all(self) -> tuple[Mapping[str, Sequence[Row]], dict[str, int]]:
        """Return the rows of each split, and the counts: rows read, rows left out by reason, the size of each split."""

    @cached_property
    def _read(self) -> tuple[Mapping[str, Sequence[Row]], dict[str, int]]:
        return self.read_all()

    def rows(self, split: str) -> Sequence[Row]:
        """Return the rows of a split."""
        return self._read[0][check_split(split)]

    @property
    def counts(self) -> dict[str, int]:
        return dict(self._read[1])

    @property
    def holds_out(self) -> bool:
        """Whether a validation split was asked for."""
        return self.validation > 0


@runtime_checkable
class HoldsOut(Protocol):
    """A source or data set that says whether its settings ask for a validation split."""

    @property
    def holds_out(self) -> bool: ...


def holds_out(data: Any) -> bool:
    """Return whether a source or data set was asked for a validation split; True if it does not say."""
    return data.holds_out if isinstance(data, HoldsOut) else True


def check_split(split: str) -> str:
    """Return `split`, or raise `ConfigError` if there is no split of that name."""
    check_choice("split", split, SPLITS)
    return split


def check_fractions(validation: float, test: float) -> None:
    """Raise `ConfigError` unless both are fractions and leave something to train on."""
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ConfigError(
            f"validation and test are fractions of the rows, each at least 0 and together less than 1, "
            f"got validation={validation}, test={test}"
        )


def normalised(text: str) -> str:
    """Return the text with each run of white space replaced by one space; the split of a text depends on this form."""
    return " ".join(text.split())


def text_digest(text: str) -> bytes:
    """Return the SHA-256 of the normalised text."""
    return sha256(normalised(text))


def sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split_rows(
    rows: Iterable[Row],
    *,
    validation: float = 0.05,
    test: float = 0.05,
    mark: Callable[[Row], bytes] = lambda row: sha256(row.text),
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Return the rows of each split, without duplicates and in the order of their hashes, and the counts.

    The SHA-256 of a text's normalised form, read as a number u in [0, 1), chooses its split: test if u < test, else
    validation if u < test + validation, else train. Two rows are duplicates if `mark` gives the same hash for both
    (default: the hash of the text). The counts are `duplicates` and the size of each split.
    """
    rows = list(rows)
    order, counts = split_order(
        b"".join(text_digest(row.text) for row in rows), b"".join(map(mark, rows)), validation=validation, test=test
    )
    return {name: [rows[i] for i in places] for name, places in order.items()}, counts


def given_splits(
    splits: dict[str, list[Row]], *, mark: Callable[[Row], bytes] = lambda row: sha256(row.text)
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Return splits that a user made, each in its own order, without duplicates and with no text in two splits.

    A text of the test split is removed from validation and train, and a text of the validation split from train. The
    counts are `duplicates`, `leaked` (the rows removed in this way) and the size of each split.
    """
    rows = [row for name in SPLITS for row in splits.get(name, [])]
    order, counts = given_order(
        b"".join(text_digest(row.text) for row in rows),
        b"".join(map(mark, rows)),
        np.repeat(range(len(SPLITS)), [len(splits.get(name, [])) for name in SPLITS]),
    )
    return {name: [rows[i] for i in places] for name, places in order.items()}, counts


def split_order(
    digests: bytes, marks: bytes, *, validation: float, test: float
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return the row numbers of each split, int64, and the counts; the rules are those of `split_rows`.

    `digests` holds the hash of each row's normalised text, and `marks` the hash that duplicates share, 32 bytes a row.
    The first of several duplicates is kept. Ordering by hash shuffles a file that is sorted (by label, for example), so
    that the first 200 rows of a split are a fair sample of it.
    """
    check_fractions(validation, test)
    texts = _hashes(digests)
    keep = _firsts(_hashes(marks))
    keep = keep[np.argsort(texts[keep], kind="stable")]
    number = np.frombuffer(digests, dtype=">u8")[keep * (HASH_BYTES // 8)] / 2.0**64
    is_test, is_held_out = number < test, number < test + validation
    order = {"train": keep[~is_test & ~is_held_out], "validation": keep[~is_test & is_held_out], "test": keep[is_test]}
    return order, {"duplicates": len(texts) - len(keep), **{name: len(order[name]) for name in SPLITS}}


def given_order(digests: bytes, marks: bytes, split: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """As `split_order`, by the rules of `given_splits`; `split` holds each row's split, as an index into `SPLITS`."""
    texts, same = _hashes(digests), _hashes(marks)
    seen, counts, order = texts[:0], {"duplicates": 0, "leaked": 0}, {}
    for number, name in reversed(list(enumerate(SPLITS))):
        rows = np.flatnonzero(split == number)
        keep = rows[_firsts(same[rows])]
        order[name] = keep[~np.isin(texts[keep], seen)]
        counts["duplicates"] += len(rows) - len(keep)
        counts["leaked"] += len(keep) - len(order[name])
        seen = np.concatenate([seen, texts[rows]])
    return order, {**counts, **{name: len(order[name]) for name in SPLITS}}


def _hashes(joined: bytes) -> np.ndarray:
    """Return concatenated hashes as an array of one hash each, without a copy; they sort as Python's bytes do."""
    return np.frombuffer(joined, dtype=f"S{HASH_BYTES}")


def _firsts(marks: np.ndarray) -> np.ndarray:
    """Return the index of the first of each set of equal marks, in ascending order, int64."""
    return np.sort(np.unique(marks, return_index=True)[1]).astype(np.int64)
