"""What `PromptData` and `ExampleData` share: a source's rows made into tokenised items, split by split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from rlft.core.cache_dir import key_of
from rlft.core.errors import DataError
from rlft.core.rng import order
from rlft.data.encode import Encoder, tokenizer_key
from rlft.data.source import Row, Source, check_split, holds_out
from rlft.data.store import Writer, stored

T = TypeVar("T")


class TokenisedData(ABC, Generic[T]):
    """Items (prompts or examples) that are tokenised when their split is first asked for.

    If the source has a key, the items are cached on disk, and each is read from there when it is asked for: a million
    of them take no memory.
    """

    noun: str  # "prompt" or "example": the name of an item in counts, messages and cache entries
    stored_as: Any  # StoredPrompts or StoredExamples: the class that writes items into the store and reads them back

    def __init__(self, source: Source, *, tokenizer: Encoder) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._made: dict[str, tuple[Sequence[T], dict[str, int]]] = {}

    @abstractmethod
    def make(self, split: str, left_out: dict[str, int]) -> Iterator[tuple[int, Row, T]]:
        """Yield (row's number in the split, row, item), and count in `left_out` the rows left out, by reason."""

    @abstractmethod
    def key_parts(self) -> dict[str, Any]:
        """Return the settings that the items depend on, for the cache key (JSON values)."""

    def items(self, split: str) -> Sequence[T]:
        """Return the items of a split in the source's order."""
        return self._load(split)[0]

    def batch(self, step: int, *, size: int, seed: int) -> list[T]:
        """Return the `size` training items of a step: a function of its arguments only, each epoch a permutation."""
        items, left_out = self._load("train")
        if not items:
            raise DataError(
                f"the train split has no {self.noun} ({left_out}): give more rows, or rows that can be used"
            )
        return [items[index] for index in order(len(items), seed=seed, start=step * size, count=size)]

    @property
    def holds_out(self) -> bool:
        """Whether the source was asked for a validation split."""
        return holds_out(self.source)

    @property
    def counts(self) -> dict[str, int]:
        """The source's counts, and for train and validation the items and the rows left out, by reason."""
        counts = dict(self.source.counts)
        for split in ("train", "validation"):
            items, left_out = self._load(split)
            counts[f"{split}_{self.noun}s"] = len(items)
            for reason, number in left_out.items():
                counts[reason] = counts.get(reason, 0) + number
        return counts

    def _load(self, split: str) -> tuple[Sequence[T], dict[str, int]]:
        """Return the items of a split, and the counts of its rows that were left out."""
        if check_split(split) not in self._made:
            source, left_out = key_of(self.source, made_by=self), dict[str, int]()
            if source is None:
                self._made[split] = [item for _, _, item in self.make(split, left_out)], left_out
            else:
                key = {"source": source, "split": split, **self.key_parts(), **tokenizer_key(self.tokenizer)}
                store = stored(f"{self.noun}s", key, lambda writer: self._write(writer, split))
                self._made[split] = self.stored_as(store, lambda: self.source.rows(split)), store.meta["counts"]
        return self._made[split]

    def _write(self, writer: Writer, split: str) -> dict[str, Any]:
        left_out: dict[str, int] = {}
        write = self.stored_as.columns(writer)
        for number, row, item in self.make(split, left_out):
            write(number, row, item)
        return {"counts": left_out}
