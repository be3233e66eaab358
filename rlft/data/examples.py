"""Examples: a prompt with its given completions (as ids) or its given label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlft.core.errors import ConfigError, DataError, check_choice
from rlft.data.encode import Encoder, chat_key, in_chunks
from rlft.data.kinds import Kind
from rlft.data.prompts import Prompt, StoredPrompts
from rlft.data.source import Row, Source
from rlft.data.store import Lazy, Store, Writer
from rlft.data.tokenised import TokenisedData

ON_UNUSABLE = ("error", "skip")


@dataclass(frozen=True)
class Example:
    """A prompt with its completions (ids, none of them empty) and its label, as far as it has them."""

    prompt: Prompt
    completions: tuple[list[int], ...] = ()
    label: int = 0  # the index of a class; or 1 for a desirable completion and 0 for an undesirable one
    is_cut: bool = False  # whether the text was truncated

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and its longest completion together."""
        return len(self.prompt.ids) + max(map(len, self.completions), default=0)


@dataclass(frozen=True)
class Unusable:
    """A row that no example can be made from."""

    reason: str  # the name that it is counted under
    message: str  # what is wrong; begins with the row's place


class StoredExamples(Lazy[Example]):
    """Examples in the store; each is made when it is asked for, as by `StoredPrompts`.

    Attributes:
        lengths: tokens of each prompt and its longest completion together, int64 [N].
        labels: int64 [N]. is_cut: uint8 [N].
    """

    def __init__(self, store: Store, rows: Callable[[], Sequence[Row]]) -> None:
        self.store, self.prompts = store, StoredPrompts(store, rows)
        self.lengths, self.labels = store.arrays["lengths"], store.arrays["labels"]
        self.is_cut = store.arrays["is_cut"]

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, index: int) -> Example:
        ends = self.store.arrays["completions_until"]  # number of completions up to and with each example's
        numbers = range(ends[index - 1] if index else 0, ends[index])
        completions = tuple(self.store.row("completions", number).tolist() for number in numbers)
        return Example(self.prompts[index], completions, int(self.labels[index]), bool(self.is_cut[index]))

    @staticmethod
    def columns(writer: Writer) -> Callable[[int, Row, Example], None]:
        """Return a function (row's number in the split, row, example) that writes the example into the store."""
        prompt, completions = StoredPrompts.columns(writer), writer.ragged("completions", "int32")
        ends, lengths = writer.column("completions_until", "int64"), writer.column("lengths", "int64")
        labels, is_cut = writer.column("labels", "int64"), writer.column("is_cut", "uint8")
        total = 0

        def write(number: int, row: Row, example: Example) -> None:
            nonlocal total
            total += len(example.completions)
            prompt(number, row, example.prompt)
            for ids in example.completions:
                completions(ids)
            ends.append(total)
            lengths.append(example.num_tokens)
            labels.append(example.label)
            is_cut.append(example.is_cut)

        return write


def example_lengths(examples: Sequence[Example]) -> np.ndarray:
    """Return the number of tokens of each example, int64 [N]; examples in the store are not made for it."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return np.array([example.num_tokens for example in examples], dtype=np.int64)


class ExampleData(TokenisedData[Example]):
    """The examples of a source, split by split.

    Arguments:
        max_tokens: the most tokens of a prompt and a completion together; None: no limit but the model's context.
        on_unusable: a row that cannot be used (too long, no text, …) is an error with its file and line ("error"), or
            left out and counted under its reason ("skip").
    """

    kind: Kind
    noun, stored_as = "example", StoredExamples
    reasons: tuple[str, ...] = ("too_long",)

    def __init__(self, source: Source, *, tokenizer: Encoder, max_tokens: int | None, on_unusable: str) -> None:
        check_choice("data.on_unusable", on_unusable, ON_UNUSABLE)
        if max_tokens is not None and max_tokens < 2:
            raise ConfigError(f"data.max_tokens is at least 2, or null for no limit, got {max_tokens}")
        super().__init__(source, tokenizer=tokenizer)
        self.max_tokens, self.on_unusable = max_tokens, on_unusable

    @abstractmethod
    def read(self, rows: list[Row]) -> Iterator[Example | Unusable]:
        """Yield an example for each row, or why there is none."""

    @abstractmethod
    def settings(self) -> list[Any]:
        """Return the subclass's own settings that an example depends on, for the cache key (JSON values)."""

    def check_columns(self, row: Row) -> None:
        """Raise `DataError` if this row, the first of a split, lacks a column."""

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split in the source's order."""
        return self.items(split)

    def key_parts(self) -> dict[str, Any]:
        settings = [type(self).__name__, self.max_tokens, self.on_unusable, *self.settings()]
        return {"settings": settings, "chat": chat_key(self.tokenizer)}

    def make(self, split: str, left_out: dict[str, int]) -> Iterator[tuple[int, Row, Example]]:
        left_out |= dict.fromkeys(self.reasons, 0)
        for start, rows in in_chunks(self.source.rows(split), "tokenising examples"):
            if start == 0:
                self.check_columns(rows[0])
            for number, (row, found) in enumerate(zip(rows, map(self._fitting, self.read(rows)), strict=True), start):
                if isinstance(found, Example):
                    yield number, row, found
                elif self.on_unusable == "skip":
                    left_out[found.reason] += 1
                else:
                    raise DataError(f"{found.message}; data.on_unusable=skip leaves such rows out and counts them")

    def _fitting(self, found: Example | Unusable) -> Example | Unusable:
        if self.max_tokens is None or isinstance(found, Unusable) or found.num_tokens <= self.max_tokens:
            return found
        what = f"{found.num_tokens} tokens, more than data.max_tokens={self.max_tokens}"
        return Unusable("too_long", f"{found.prompt.where}: the prompt and its completion have {what}")
