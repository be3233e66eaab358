"""Prompts with completions that are given: TRL's columns `prompt` and `completion`, as text and as ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from rlft.cache import key_of
from rlft.counted import order
from rlft.data.encode import Encoder, chat_key, encode_texts, in_chunks, tokenizer_key
from rlft.data.prompts import Prompt, PromptData, StoredPrompts, prompt_columns
from rlft.data.source import Row, Source, check_split, holds_out
from rlft.data.store import Lazy, Store, Writer, stored
from rlft.data.table import check_messages, check_unicode
from rlft.errors import ConfigError, DataError, nearest

ON_UNUSABLE = ("error", "skip")


@dataclass(frozen=True)
class Example:
    """A prompt with its completions (ids, none empty) and its label, where it has them."""

    prompt: Prompt
    completions: tuple[list[int], ...] = ()
    label: int = 0  # a class, or 1 for a desirable completion and 0 for another
    is_cut: bool = False  # whether it was longer, and shortened as the data's settings ask

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt.ids) + max(map(len, self.completions), default=0)


@dataclass(frozen=True)
class Unusable:
    """A row of which no example can be made: the name that it is counted under, and what is wrong with it."""

    reason: str
    message: str  # begins with the row's place


class StoredExamples(Lazy[Example]):
    """Examples in the store, each made when it is asked for, as `StoredPrompts`.

    Attributes:
        lengths: tokens of each prompt with its longest completion, int64 [N].
        labels: int64 [N]. is_cut: uint8 [N].
    """

    def __init__(self, store: Store, rows: Callable[[], Sequence[Row]]) -> None:
        self.store, self.prompts = store, StoredPrompts(store, rows)
        self.lengths, self.labels = store.arrays["lengths"], store.arrays["labels"]
        self.is_cut = store.arrays["is_cut"]

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, index: int) -> Example:
        ends = self.store.arrays["completions_until"]  # of this example's completions and all before it
        numbers = range(ends[index - 1] if index else 0, ends[index])
        completions = tuple(self.store.row("completions", number).tolist() for number in numbers)
        return Example(self.prompts[index], completions, int(self.labels[index]), bool(self.is_cut[index]))


def example_columns(writer: Writer) -> Callable[[int, Row, Example], None]:
    """Return what writes an example of a row, whose number in the split it is given, for `StoredExamples`."""
    prompt, completions = prompt_columns(writer), writer.ragged("completions", "int32")
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
    """Return the number of tokens of each example, int64 [N], without making those that are in the store."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return np.array([example.num_tokens for example in examples], dtype=np.int64)


@dataclass(frozen=True)
class _Plain:
    """A completion that is still to be encoded, and what follows it."""

    text: str
    end: list[int]


class ExampleData(ABC):
    """Examples split by split, tokenised at the first call.

    Arguments:
        max_tokens: the longest prompt with completion, in tokens; None: no limit but the model's context.
        on_unusable: a row that cannot be used (too long, no text, …) is an error with its file and line ("error"), or
            left out and counted under its reason ("skip").
    """

    reasons: tuple[str, ...] = ("too_long",)

    def __init__(self, source: Source, *, tokenizer: Encoder, max_tokens: int | None, on_unusable: str) -> None:
        if on_unusable not in ON_UNUSABLE:
            allowed, hint = ", ".join(ON_UNUSABLE), nearest(on_unusable, ON_UNUSABLE)
            raise ConfigError(f"data.on_unusable is one of {allowed}, got {on_unusable!r}{hint}")
        if max_tokens is not None and max_tokens < 2:
            raise ConfigError(f"data.max_tokens is at least 2, or null for no limit, got {max_tokens}")
        self.source, self.tokenizer, self.max_tokens, self.on_unusable = source, tokenizer, max_tokens, on_unusable
        self._made: dict[str, tuple[Sequence[Example], dict[str, int]]] = {}

    @abstractmethod
    def read(self, rows: list[Row]) -> Iterator[Example | Unusable]:
        """Yield an example for each row."""

    @abstractmethod
    def settings(self) -> list[Any]:
        """Return what an example depends on beside its row, `max_tokens` and the tokenizer (JSON values)."""

    def check_columns(self, row: Row) -> None:
        """Raise `DataError` for the first row of a split that lacks a column."""

    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split in the source's order, tokenised and kept as `PromptData.prompts` is."""
        return self._make(split)[0]

    def batch(self, step: int, *, size: int, seed: int) -> list[Example]:
        """Return the `size` training examples of a step: a function of its arguments only, each epoch a permutation."""
        examples, left_out = self._make("train")
        if not examples:
            raise DataError(f"the train split has no example ({left_out}): give more rows")
        return [examples[index] for index in order(len(examples), seed=seed, start=step * size, count=size)]

    @property
    def holds_out(self) -> bool:
        """Whether the source was asked for a validation split."""
        return holds_out(self.source)

    @property
    def counts(self) -> dict[str, int]:
        """The source's counts; examples for training and validation; and rows left out of them, by reason."""
        counts = dict(self.source.counts)
        for split in ("train", "validation"):
            examples, left_out = self._make(split)
            counts[f"{split}_examples"] = len(examples)
            for reason, number in left_out.items():
                counts[reason] = counts.get(reason, 0) + number
        return counts

    def _make(self, split: str) -> tuple[Sequence[Example], dict[str, int]]:
        if check_split(split) not in self._made:
            source = key_of(self.source)
            if source is None:
                left_out = dict.fromkeys(self.reasons, 0)
                self._made[split] = [example for _, _, example in self._usable(split, left_out)], left_out
            else:
                settings = [type(self).__name__, self.max_tokens, self.on_unusable, *self.settings()]
                key = {"source": source, "split": split, "settings": settings, "chat": chat_key(self.tokenizer)}
                key |= tokenizer_key(self.tokenizer)
                store = stored("examples", key, lambda writer: self._write(writer, split))
                self._made[split] = StoredExamples(store, lambda: self.source.rows(split)), store.meta["counts"]
        return self._made[split]

    def _write(self, writer: Writer, split: str) -> dict[str, Any]:
        left_out = dict.fromkeys(self.reasons, 0)
        write = example_columns(writer)
        for number, row, example in self._usable(split, left_out):
            write(number, row, example)
        return {"counts": left_out}

    def _usable(self, split: str, left_out: dict[str, int]) -> Iterator[tuple[int, Row, Example]]:
        """Yield each example with its row and the row's number in the split; count in `left_out` what is left out."""
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


def truth(value: object) -> bool | None:
    """Return what a column of JSON or CSV says: true or 1, false or 0; None for anything else."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


class CompletionData(ExampleData):
    """Prompts with one completion each, for supervised training on the completion.

    A prompt that is a conversation goes through the tokenizer's chat template, as `PromptData` describes; its
    completion is one message of the assistant, and becomes what the template writes for it, end mark included. Any
    other completion is encoded by itself and ends with the end-of-text token, where the tokenizer has one. A column
    `<completion's column>_ends` may say false of a completion that was cut short, and then no such token follows.

    Arguments beside `ExampleData`'s: completion_column, the column that holds the completion.
    """

    reasons: tuple[str, ...] = ("too_long", "no_text")

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Encoder,
        completion_column: str = "completion",
        max_tokens: int | None = None,
        on_unusable: str = "error",
    ) -> None:
        super().__init__(source, tokenizer=tokenizer, max_tokens=max_tokens, on_unusable=on_unusable)
        self.columns: tuple[str, ...] = (completion_column,)
        self.end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self._prompts = PromptData(source, tokenizer=tokenizer)

    def settings(self) -> list[Any]:
        return [self.columns]

    def read(self, rows: list[Row]) -> Iterator[Example | Unusable]:
        made = zip(rows, self._prompts.whole(rows), strict=True)
        prompts = [self._prompts.prompt(row, text, ids) for row, (text, ids) in made]
        found = [self._found(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        plain = [
            (one.text, row.where)
            for row, completions in zip(rows, found, strict=True)
            if not isinstance(completions, Unusable)
            for one in completions
            if isinstance(one, _Plain)
        ]
        encoded = encode_texts([text for text, _ in plain], [where for _, where in plain], tokenizer=self.tokenizer)
        for prompt, completions in zip(prompts, found, strict=True):
            if isinstance(completions, Unusable):
                yield completions
            else:
                ids = tuple(next(encoded) + one.end if isinstance(one, _Plain) else one for one in completions)
                yield self.example(Example(prompt, ids))

    def example(self, example: Example) -> Example | Unusable:
        """Return the example as a subclass wants it, or what is wrong with it."""
        return example

    def check_columns(self, row: Row) -> None:
        for column in self.columns:
            if column not in row.columns:
                names = list(row.columns)
                raise DataError(
                    f"{row.where}: there is no column {column!r}{nearest(column, names)}; beside the prompt there are "
                    f"{', '.join(names) or 'none'}"
                )

    def _found(self, row: Row, prompt: Prompt) -> list[_Plain | list[int]] | Unusable:
        """Return the row's completions as texts that are still to be encoded, or as ids; or what is wrong."""
        try:
            return [self._completion(row, prompt, column) for column in self.columns]
        except DataError as error:
            return Unusable("no_text", str(error))

    def _completion(self, row: Row, prompt: Prompt, column: str) -> _Plain | list[int]:
        value = row.columns[column]
        if row.messages is None:
            if not isinstance(value, str):
                raise DataError(
                    f"{row.where}: {column!r} must be a string, as the prompt is, got {type(value).__name__}"
                )
            check_unicode(value, row.where, column)
            text = value
        else:
            messages = check_messages(value, row.where, column) if isinstance(value, list) else ()
            if [message["role"] for message in messages] != ["assistant"]:
                raise DataError(
                    f"{row.where}: the prompt is a conversation, and so {column!r} is a list with one message of the "
                    f"assistant, got {str(value)[:80]}"
                )
            if self.tokenizer.hf.chat_template is not None:
                return self._reply(row, prompt, messages)
            text = messages[0]["content"]  # to one message of the user
        ends = True if row.columns.get(f"{column}_ends") is None else truth(row.columns[f"{column}_ends"])
        if ends is None:
            raise DataError(f"{row.where}: '{column}_ends' is true or false, got {row.columns[f'{column}_ends']!r}")
        plain = _Plain(text, self.end if ends else [])
        if not text and not plain.end:
            raise DataError(f"{row.where}: {column!r} is empty, and no end-of-text token follows")
        return plain

    def _reply(self, row: Row, prompt: Prompt, messages: tuple[dict[str, str], ...]) -> list[int]:
        """Return the ids of what the chat template writes after the prompt."""
        hf = self.tokenizer.hf
        for token in hf.all_special_tokens:
            if token in messages[0]["content"]:
                raise DataError(f"{row.where}: a message holds the control token {token!r} as text: take it out")
        try:
            whole = hf.apply_chat_template([*(row.messages or ()), *messages], tokenize=False)
        except TemplateError as error:
            raise DataError(f"{row.where}: the tokenizer's chat template refuses this conversation: {error}") from error
        if not whole.startswith(prompt.text) or whole == prompt.text:
            raise DataError(f"{row.where}: the tokenizer's chat template does not write the answer behind its prompt")
        return hf(whole[len(prompt.text) :], add_special_tokens=False, split_special_tokens=False)["input_ids"]
