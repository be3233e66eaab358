"""Prompts that the policy continues: text, ids, and the columns that the rewards receive."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlft.core.errors import ConfigError, DataError, check_choice
from rlft.core.ranges import Size, SizeOrZero
from rlft.data.encode import Encoder, chat_key, encode_texts, in_chunks
from rlft.data.kinds import Kind
from rlft.data.source import Row, Source
from rlft.data.store import Lazy, Store, Writer
from rlft.data.tokenised import TokenisedData

ON_LONG = ("error", "skip")


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, its ids (never empty), the other columns of its row, and its place as `"file:line"`.

    `messages` is the conversation that the text was rendered from, or None.
    """

    text: str
    ids: list[int]
    columns: dict[str, Any]
    where: str
    messages: tuple[dict[str, str], ...] | None = None


class StoredPrompts(Lazy[Prompt]):
    """Prompts in the store; each is made when it is asked for, from its arrays and its row (`rows` returns the rows).

    Attributes:
        lengths: tokens of each prompt, int64 [N].
    """

    def __init__(self, store: Store, rows: Callable[[], Sequence[Row]]) -> None:
        self.store, self._rows = store, rows
        self.lengths = store.lengths("ids")

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, index: int) -> Prompt:
        row = self._rows()[int(self.store.arrays["row"][index])]
        ids = self.store.row("ids", index).tolist()
        if self.store.arrays["is_whole"][index]:
            return Prompt(row.text, ids, row.columns, row.where, row.messages)
        text = self.store.row("text", index).tobytes().decode()
        return Prompt(text, ids, row.columns, row.where, row.messages)

    @staticmethod
    def columns(writer: Writer) -> Callable[[int, Row, Prompt], None]:
        """Return a function (row's number in the split, row, prompt) that writes the prompt into the store."""
        numbers, ids, text, is_whole = (
            writer.column("row", "int64"),
            writer.ragged("ids", "int32"),
            writer.ragged("text"),
            writer.column("is_whole", "uint8"),
        )

        def write(number: int, row: Row, prompt: Prompt) -> None:
            numbers.append(number)
            ids(prompt.ids)
            is_whole.append(prompt.text == row.text)  # then the text is not stored again
            text(b"" if prompt.text == row.text else prompt.text.encode())

        return write


def prompt_lengths(prompts: Sequence[Prompt]) -> np.ndarray:
    """Return the number of tokens of each prompt, int64 [N]; prompts in the store are not made for it."""
    if isinstance(prompts, StoredPrompts):
        return prompts.lengths
    return np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64)


class PromptData(TokenisedData[Prompt]):
    """The prompts of a source, split by split. Nothing is truncated unless a setting asks for it.

    A conversation is rendered by the tokenizer's chat template, up to the mark that starts the assistant's turn. If the
    tokenizer has no template, a single message of the user is used as it is, and a longer conversation is refused. An
    empty prompt becomes the end-of-text token alone, which is how GPT-2 samples unconditionally.

    Args:
        source: where the texts come from.
        tokenizer: turns them into ids.
        prompt_tokens: the prompt is this many tokens from the start of the text (0: the empty prompt). A text that is
            not longer than that is left out and counted as `too_short`. None: the prompt is the whole text.
        max_prompt_tokens: the longest prompt allowed, in tokens, if the prompt is the whole text (None: no limit).
        on_long: a longer prompt is an error with its file and line ("error"), or left out and counted as `too_long`
            ("skip").

    Raises:
        ConfigError: an argument is wrong. DataError, from the methods: a row cannot be used.
    """

    kind = Kind.PROMPTS
    noun, stored_as = "prompt", StoredPrompts

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Encoder,
        prompt_tokens: SizeOrZero | None = None,
        max_prompt_tokens: Size | None = None,
        on_long: str = "error",
    ) -> None:
        if prompt_tokens is not None and prompt_tokens < 0:
            raise ConfigError(f"prompt_tokens is at least 0, or null for the whole text, got {prompt_tokens}")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens is at least 1, or null for no limit, got {max_prompt_tokens}")
        if prompt_tokens is not None and max_prompt_tokens is not None:
            raise ConfigError(
                f"prompt_tokens={prompt_tokens} gives every prompt that length, so max_prompt_tokens="
                f"{max_prompt_tokens} has nothing to do: set one of them to null"
            )
        check_choice("data.on_long", on_long, ON_LONG)
        super().__init__(source, tokenizer=tokenizer)
        self.prompt_tokens, self.max_prompt_tokens, self.on_long = prompt_tokens, max_prompt_tokens, on_long

    def prompts(self, split: str) -> Sequence[Prompt]:
        """Return the prompts of a split in the source's order."""
        return self.items(split)

    def key_parts(self) -> dict[str, Any]:
        chat = None if self.prompt_tokens is not None else chat_key(self.tokenizer)
        return {"settings": [self.prompt_tokens, self.max_prompt_tokens, self.on_long], "chat": chat}

    def make(self, split: str, left_out: dict[str, int]) -> Iterator[tuple[int, Row, Prompt]]:
        left_out |= {"too_short" if self.prompt_tokens is not None else "too_long": 0, "empty": 0}
        make = self.whole if self.prompt_tokens is None else self._openings
        held_out: set[tuple[int, ...]] = set()
        if split == "train" and self.prompt_tokens is not None:  # two texts in different splits may begin alike
            left_out["leaked_openings"] = 0
            held_out = {tuple(prompt.ids) for name in ("validation", "test") for prompt in self.prompts(name)}
        for start, rows in in_chunks(self.source.rows(split), "tokenising prompts"):
            for number, (row, made) in enumerate(zip(rows, make(rows), strict=True), start):
                if made is None:
                    left_out["too_short"] += 1
                    continue
                text, ids = made
                if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
                    if self.on_long == "error":
                        raise DataError(
                            f"{row.where}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens="
                            f"{self.max_prompt_tokens}: raise it, or set data.on_long=skip to leave long prompts out"
                        )
                    left_out["too_long"] += 1
                    continue
                left_out["empty"] += not ids
                prompt = self.prompt(row, text, ids)
                if tuple(prompt.ids) in held_out:
                    left_out["leaked_openings"] += 1
                else:
                    yield number, row, prompt

    def _openings(self, rows: list[Row]) -> Iterator[tuple[str, list[int]] | None]:
        """Yield the text and the ids of each row's first `prompt_tokens` tokens; None for a row that is too short."""
        assert self.prompt_tokens is not None
        for ids in self._first_ids(rows, self.prompt_tokens + 1):
            opening = ids[: self.prompt_tokens]
            yield None if len(ids) <= self.prompt_tokens else (self.tokenizer.decode(opening), opening)

    def _first_ids(self, rows: list[Row], num_tokens: int) -> list[list[int]]:
        """Return at least the first `num_tokens` ids of each row, or all ids of a shorter row.

        Only the first words of a text are encoded, because encoding all film reviews in full takes 30 s. The cut is at
        the end of a word: a tokenizer that first splits at white space (every byte-level BPE) then gives the same ids
        as for the whole text.
        """
        for row in rows:
            if row.messages is not None:
                raise DataError(
                    f"{row.where}: prompt_tokens cuts plain texts, and this is a conversation: set it to null"
                )
        words = re.compile(rf"(?:\s*\S+){{0,{2 * num_tokens + 8}}}")
        heads = [head[0] if (head := words.match(row.text)) else "" for row in rows]
        found = list(encode_texts(heads, [row.where for row in rows], tokenizer=self.tokenizer))
        for i, ids in enumerate(found):
            if len(ids) < num_tokens and len(heads[i]) < len(rows[i].text):
                found[i] = next(encode_texts([rows[i].text], [rows[i].where], tokenizer=self.tokenizer))
        return found

    def whole(self, rows: list[Row]) -> Iterator[tuple[str, list[int]]]:
        """Yield the text and the ids of each row; a conversation is rendered by the chat template."""
        plain = [row for row in rows if row.messages is None]
        encoded = encode_texts([row.text for row in plain], [row.where for row in plain], tokenizer=self.tokenizer)
        for row in rows:
            yield (row.text, next(encoded)) if row.messages is None else rendered(row, tokenizer=self.tokenizer)

    def prompt(self, row: Row, text: str, ids: list[int]) -> Prompt:
        """Return a prompt of these ids, or of the end-of-text token if there are none."""
        if not ids:
            if self.tokenizer.eos_id is None:
                raise DataError(
                    f"{row.where}: an empty prompt starts from the end-of-text token, and this tokenizer has none: "
                    f"leave empty prompts out, or use another tokenizer"
                )
            ids = [self.tokenizer.eos_id]
        return Prompt(text, ids, row.columns, row.where, row.messages)


def rendered(row: Row, *, tokenizer: Encoder) -> tuple[str, list[int]]:
    """Return a conversation as the chat template renders it, as text and ids; raises `DataError` where it cannot."""
    assert row.messages is not None
    hf = tokenizer.hf
    if hf.chat_template is None:
        if len(row.messages) == 1 and row.messages[0]["role"] == "user":
            return row.text, next(encode_texts([row.text], [row.where], tokenizer=tokenizer))
        raise DataError(
            f"{row.where}: a conversation of {len(row.messages)} messages needs a tokenizer with a chat template; "
            f"with this one, give the prompt as a string or as a single message of the user"
        )
    if row.messages[-1]["role"] == "assistant":
        raise DataError(f"{row.where}: the conversation ends with the assistant: end it with the user's message")
    for message in row.messages:
        for token in hf.all_special_tokens:
            if token in message["content"]:
                raise DataError(f"{row.where}: a message holds the control token {token!r} as text: take it out")
    from jinja2 import TemplateError  # only conversations need it

    try:
        text = hf.apply_chat_template(list(row.messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"{row.where}: the tokenizer's chat template refuses this conversation: {error}") from error
    return text, hf(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
