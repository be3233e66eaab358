"""What a data set is made of: rows of text, each in exactly one of three splits.

The split of a text is a function of the text alone (a hash), so it depends neither on the order of the rows nor on
what else the file holds: a text added later moves no other text from train to test. The hash is of the text with each
run of white space as one space, so that texts which differ in white space alone are never in two splits; they are
duplicates only where they are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlft.core.errors import ConfigError, nearest

SPLITS = ("train", "validation", "test")
HASH_BYTES = 32  # of SHA-256


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
    """A data set that can be read split by split; `counts` says how many rows it has, dropped and kept.

    A source may also have a `key` (`rlft.core.cache_dir.Keyed`); what is made of its rows is then kept in the cache
    directory. A class whose rows always have the same columns names them in a tuple, `columns`; a data set that needs
    another column is then refused before anything is read.
    """

    @property
    def counts(self) -> dict[str, int]: ...

    def rows(self, split: str) -> Sequence[Row]: ...


@runtime_checkable
class HoldsOut(Protocol):
    """A source, or the data made of it, that says whether rows were asked to be held out for the evaluation."""

    @property
    def holds_out(self) -> bool: ...


def holds_out(data: Any) -> bool:
    """Return whether a source, or the data made of it, was asked for a validation split; one that does not say was."""
    return data.holds_out if isinstance(data, HoldsOut) else True


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
    """Return the text with each run of white space as one space: what the split of a text depends on."""
    return " ".join(text.split())


def split_of(text: str, *, validation: float = 0.05, test: float = 0.05) -> str:
    """Return the split of a text: by the SHA-256 of its normalised form, read as a number in [0, 1)."""
    number = int.from_bytes(text_digest(text)[:8], "big") / 2**64
    if number < test:
        return "test"
    return "validation" if number < test + validation else "train"


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
    """Return the rows without duplicates by split, each split in the order of its hashes, and the counts.

    `mark` is a hash of what makes two rows the same (default: the text). Counts: `duplicates`, and one for each split.
    """
    rows = list(rows)
    order, counts = split_order(
        b"".join(text_digest(row.text) for row in rows), b"".join(map(mark, rows)), validation=validation, test=test
    )
    return {name: [rows[i] for i in places] for name, places in order.items()}, counts


def given_splits(
    splits: dict[str, list[Row]], *, mark: Callable[[Row], bytes] = lambda row: sha256(row.text)
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Return splits that a user made, in their own order, without duplicates and with no text in two of them.

    A text that is in test leaves validation and train, one that is in validation leaves train, counted as `leaked`.
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
    """Return which rows, by their numbers, make up each split, int64, and the counts, as `split_rows` says.

    The order of the hashes mixes a file that is sorted (say by label), so that the first 200 rows of a split are a
    fair sample of it. Of duplicates the first is kept. `digests` and `marks` are the rows' hashes, 32 bytes each, of
    their normalised texts and of what makes two rows the same.
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
    """Return which rows make up each split, and the counts, as `given_splits` says; `split` indexes `SPLITS`."""
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
    """View hashes one after another as an array of one item each; as NumPy's bytes they sort as Python's do."""
    return np.frombuffer(joined, dtype=f"S{HASH_BYTES}")


def _firsts(marks: np.ndarray) -> np.ndarray:
    """Return the index of the first of each set of equal marks, ascending, int64."""
    return np.sort(np.unique(marks, return_index=True)[1]).astype(np.int64)
