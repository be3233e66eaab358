"""Labelled data: texts with a class, for classifiers, and completions marked desirable or not, for KTO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from rlft.core.cache_dir import key_of
from rlft.core.errors import ConfigError, DataError, nearest
from rlft.data.completions import CompletionData, truth
from rlft.data.encode import Encoder, encode_texts
from rlft.data.examples import Example, ExampleData, StoredExamples, Unusable
from rlft.data.kinds import Kind
from rlft.data.prompts import Prompt
from rlft.data.source import Row, Source
from rlft.data.store import stored


class LabelledData(ExampleData):
    """Texts with a class. An example's prompt is the text with the end-of-text token, its label the index of the class.

    The classes are the labels of the training split: first whole numbers in order of size, then other names in
    alphabetical order.

    Arguments in addition to `ExampleData`'s:
        label_column: the column that holds the label: a string, a whole number or a bool.
        truncate: if true, a text of more than max_tokens is cut to its first tokens and counted; if false, it is
            unusable.
    """

    kind = Kind.LABELLED
    reasons = ("too_long", "no_text", "no_label")

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Encoder,
        label_column: str = "label",
        truncate: bool = False,
        max_tokens: int | None = None,
        on_unusable: str = "error",
    ) -> None:
        super().__init__(source, tokenizer=tokenizer, max_tokens=max_tokens, on_unusable=on_unusable)
        if truncate and max_tokens is None:
            raise ConfigError(
                "data.truncate=true cuts texts to data.max_tokens: set it, at most to the model's context"
            )
        self.label_column, self.truncate = label_column, truncate
        self.end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes; a name's index is the label."""
        source = key_of(self.source)
        if source is None:
            return self._classes()
        key = {"source": source, "label": self.label_column}
        return stored("classes", key, lambda writer: {"classes": self._classes()}).meta["classes"]

    def _classes(self) -> list[str]:
        rows = self.source.rows("train")
        if rows and self.label_column not in rows[0].columns:
            names = list(rows[0].columns)
            raise DataError(
                f"{rows[0].where}: there is no column {self.label_column!r}{nearest(self.label_column, names)}; beside "
                f"the text there are {', '.join(names) or 'none'}: set data.label_column"
            )
        found = {name for row in rows if (name := self._name(row)) is not None}
        if len(found) < 2:
            raise DataError(f"a classifier needs two classes; {self.label_column!r} is {', '.join(found) or 'empty'}")
        return sorted(found, key=lambda name: (0, int(name), "") if _is_whole(name) else (1, 0, name))

    @property
    def counts(self) -> dict[str, int]:
        """As for `ExampleData`, and the number of truncated texts."""
        held = [self.examples(split) for split in ("train", "validation")]
        return super().counts | {"truncated": sum(map(_num_cut, held))}

    def settings(self) -> list[Any]:
        return [self.label_column, self.truncate]

    def read(self, rows: list[Row]) -> Iterator[Example | Unusable]:
        encoded = encode_texts([row.text for row in rows], [row.where for row in rows], tokenizer=self.tokenizer)
        index = {name: i for i, name in enumerate(self.classes)}
        for row, ids in zip(rows, encoded, strict=True):
            label = index.get(self._name(row) or "")
            if label is None:
                given, allowed = row.columns.get(self.label_column), ", ".join(index)
                yield Unusable("no_label", f"{row.where}: {self.label_column!r} is one of {allowed}, got {given!r}")
            elif not ids:
                yield Unusable("no_text", f"{row.where}: the text is empty")
            else:
                example = Example(Prompt(row.text, ids + self.end, row.columns, row.where), label=label)
                yield self._cut(example) if self.truncate else example

    def _cut(self, example: Example) -> Example:
        assert self.max_tokens is not None
        ids = example.prompt.ids
        if len(ids) <= self.max_tokens:
            return example
        kept = ids[: self.max_tokens - len(self.end)] + self.end
        return replace(example, prompt=replace(example.prompt, ids=kept), is_cut=True)

    def _name(self, row: Row) -> str | None:
        value: Any = row.columns.get(self.label_column)
        return (str(value) or None) if isinstance(value, (str, int)) else None


class UnpairedData(CompletionData):
    """Prompts with a completion that is desirable (label true or 1) or not (false or 0), for KTO; TRL's column `label`.

    Arguments in addition to `CompletionData`'s: label_column, the column that holds the label.
    """

    kind = Kind.UNPAIRED
    reasons = ("too_long", "no_text", "no_label")

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Encoder,
        completion_column: str = "completion",
        label_column: str = "label",
        max_tokens: int | None = None,
        on_unusable: str = "error",
    ) -> None:
        super().__init__(source, tokenizer=tokenizer, max_tokens=max_tokens, on_unusable=on_unusable)
        self.columns, self.label_column = (completion_column,), label_column

    def settings(self) -> list[Any]:
        return [*super().settings(), self.label_column]

    def example(self, example: Example) -> Example | Unusable:
        value = example.prompt.columns.get(self.label_column)
        is_desirable = truth(value)
        if is_desirable is None:
            what = f"{self.label_column!r} is true (desirable) or false, got {value!r}"
            return Unusable("no_label", f"{example.prompt.where}: {what}")
        return replace(example, label=int(is_desirable))


def _num_cut(examples: Sequence[Example]) -> int:
    if isinstance(examples, StoredExamples):
        return int(examples.is_cut.sum())
    return sum(example.is_cut for example in examples)


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
