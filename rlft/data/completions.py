"""Prompts with given completions: TRL's columns `prompt` and `completion`, as text and as ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlft.core.errors import DataError, nearest
from rlft.data.encode import Encoder, encode_texts
from rlft.data.examples import Example, ExampleData, Unusable
from rlft.data.kinds import Kind
from rlft.data.prompts import Prompt, PromptData
from rlft.data.records import check_messages, check_unicode
from rlft.data.source import Row, Source


@dataclass(frozen=True)
class _Plain:
    """A completion that is still to be encoded."""

    text: str
    end: list[int]  # ids that follow those of the text


def truth(value: object) -> bool | None:
    """Return a column's value as a bool: true, "true", 1 and "1" are True, their opposites False, all else None."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


class CompletionData(ExampleData):
    """Prompts with one completion each, for supervised training on the completion.

    A prompt that is a conversation is rendered by the tokenizer's chat template, as `PromptData` describes. Its
    completion is one message of the assistant, and becomes what the template writes for that message, with the end
    mark. Any other completion is encoded by itself, and the end-of-text token follows if the tokenizer has one. It does
    not follow a completion that was cut short, which a false in the column `<completion_column>_ends` says.

    Arguments in addition to `ExampleData`'s: completion_column, the column that holds the completion.
    """

    kind = Kind.COMPLETIONS
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
        """Return the example, or why it cannot be used; for subclasses that check or change it."""
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
        """Return the row's completions, to be encoded or as ids already, or why the row cannot be used."""
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
            text = messages[0]["content"]  # the prompt is a single message of the user
        ends = True if row.columns.get(f"{column}_ends") is None else truth(row.columns[f"{column}_ends"])
        if ends is None:
            raise DataError(f"{row.where}: '{column}_ends' is true or false, got {row.columns[f'{column}_ends']!r}")
        plain = _Plain(text, self.end if ends else [])
        if not text and not plain.end:
            raise DataError(f"{row.where}: {column!r} is empty, and no end-of-text token follows")
        return plain

    def _reply(self, row: Row, prompt: Prompt, messages: tuple[dict[str, str], ...]) -> list[int]:
        """Return the ids of what the chat template writes after the prompt for the assistant's message."""
        hf = self.tokenizer.hf
        for token in hf.all_special_tokens:
            if token in messages[0]["content"]:
                raise DataError(f"{row.where}: a message holds the control token {token!r} as text: take it out")
        from jinja2 import TemplateError  # only conversations need it

        try:
            whole = hf.apply_chat_template([*(row.messages or ()), *messages], tokenize=False)
        except TemplateError as error:
            raise DataError(f"{row.where}: the tokenizer's chat template refuses this conversation: {error}") from error
        if not whole.startswith(prompt.text) or whole == prompt.text:
            raise DataError(f"{row.where}: the tokenizer's chat template does not write the answer behind its prompt")
        return hf(whole[len(prompt.text) :], add_special_tokens=False, split_special_tokens=False)["input_ids"]
