"""Prompts: what the policy is asked to continue, as text and as ids, with the columns that the rewards see."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlft.core.cache_dir import key_of
from rlft.core.errors import ConfigError, DataError, check_choice
from rlft.core.ranges import Size, SizeOrZero
from rlft.core.rng import order
from rlft.data.encode import Encoder, chat_key, encode_texts, in_chunks, tokenizer_key
from rlft.data.kinds import Kind
from rlft.data.source import Row, Source, check_split, holds_out
from rlft.data.store import Lazy, Store, Writer, stored

ON_LONG = ("error", "skip")


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, its ids (never empty), the other columns of its row, and its place as `"file:line"`.

    `messages` is the conversation of which the text was made, where it was one.
    """

    text: str
    ids: list[int]
    columns: dict[str, Any]
    where: str
    messages: tuple[dict[str, str], ...] | None = None


class StoredPrompts(Lazy[Prompt]):
    """Prompts in the store, each made when it is asked for; `rows` gives the rows that they are made from.

    Attributes:
        lengths: tokens of each, int64 [N].
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


def prompt_columns(writer: Writer) -> Callable[[int, Row, Prompt], None]:
    """Return what writes a prompt of a row, whose number in the split it is given, for `StoredPrompts`."""
    numbers, ids, text, is_whole = (
        writer.column("row", "int64"),
        writer.ragged("ids", "int32"),
        writer.ragged("text"),
        writer.column("is_whole", "uint8"),
    )

    def write(number: int, row: Row, prompt: Prompt) -> None:
        numbers.append(number)
        ids(prompt.ids)
        is_whole.append(prompt.text == row.text)  # the row has it
        text(b"" if prompt.text == row.text else prompt.text.encode())

    return write


def prompt_lengths(prompts: Sequence[Prompt]) -> np.ndarray:
    """Return the number of tokens of each prompt, int64 [N], without making those that are in the store."""
    if isinstance(prompts, StoredPrompts):
        return prompts.lengths
    return np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64)


class PromptData:
    """The prompts of a source, split by split. Nothing is truncated without being asked for.

    A row that is a conversation goes through the tokenizer's chat template, with the mark that starts the assistant's
    turn; with a tokenizer that has none, a single message of the user is taken as it is, and more are refused. An
    empty prompt becomes the end-of-text token alone, which is how GPT-2 samples unconditionally.

    Args:
        source: where the texts come from.
        tokenizer: turns them into ids.
        prompt_tokens: the prompt is the first so many tokens of the text (0: the empty prompt); a text that has no
            token more than that is left out and counted as `too_short`. None: the prompt is the whole text.
        max_prompt_tokens: the longest prompt, in tokens, where the prompt is the whole text (None: no limit).
        on_long: a longer prompt is an error with its file and line ("error"), or left out and counted as `too_long`
            ("skip").

    Raises:
        ConfigError: an argument is wrong. DataError, from the methods: a row cannot be used.
    """

    kind = Kind.PROMPTS

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
        self.source, self.tokenizer = source, tokenizer
        self.prompt_tokens, self.max_prompt_tokens, self.on_long = prompt_tokens, max_prompt_tokens, on_long
        self._made: dict[str, tuple[Sequence[Prompt], dict[str, int]]] = {}

    def prompts(self, split: str) -> Sequence[Prompt]:
        """Return the prompts of a split in the source's order.

        They are tokenised at the first call, and kept in the cache directory where the source has a key: a `Prompt` is
        then made when it is asked for, and a million of them take no memory.
        """
        return self._make(split)[0]

    def batch(self, step: int, *, size: int, seed: int) -> list[Prompt]:
        """Return the `size` training prompts of a step: a function of its arguments only, each epoch a permutation."""
        prompts = self.prompts("train")
        if not prompts:
            raise DataError(f"the train split has no prompt ({self._make('train')[1]}): give more rows or shorter ones")
        return [prompts[index] for index in order(len(prompts), seed=seed, start=step * size, count=size)]

    @property
    def holds_out(self) -> bool:
        """Whether the source was asked for a validation split."""
        return holds_out(self.source)

    @property
    def counts(self) -> dict[str, int]:
        """The source's counts; prompts for training and validation; and rows of those that are left out or empty."""
        counts = dict(self.source.counts)
        for split in ("train", "validation"):
            prompts, left_out = self._make(split)
            counts[f"{split}_prompts"] = len(prompts)
            for reason, number in left_out.items():
                counts[reason] = counts.get(reason, 0) + number
        return counts

    def _make(self, split: str) -> tuple[Sequence[Prompt], dict[str, int]]:
        if check_split(split) not in self._made:
            key = self._key(split)
            if key is None:
                counts: dict[str, int] = {}
                self._made[split] = [prompt for _, _, prompt in self._read(split, counts)], counts
            else:
                store = stored("prompts", key, lambda writer: self._write(writer, split))
                self._made[split] = StoredPrompts(store, lambda: self.source.rows(split)), store.meta["counts"]
        return self._made[split]

    def _key(self, split: str) -> dict[str, Any] | None:
        """Return all that the prompts of a split depend on; None where the source cannot be told from another."""
        source = key_of(self.source, made_by=self)
        if source is None:
            return None
        settings = [self.prompt_tokens, self.max_prompt_tokens, self.on_long]
        chat = None if self.prompt_tokens is not None else chat_key(self.tokenizer)
        return {"source": source, "split": split, "settings": settings, **tokenizer_key(self.tokenizer), "chat": chat}

    def _write(self, writer: Writer, split: str) -> dict[str, Any]:
        counts: dict[str, int] = {}
        write = prompt_columns(writer)
        for number, row, prompt in self._read(split, counts):
            write(number, row, prompt)
        return {"counts": counts}

    def _read(self, split: str, counts: dict[str, int]) -> Iterator[tuple[int, Row, Prompt]]:
        """Yield each prompt with its row and the row's number in the split; add to `counts` what is left out."""
        counts |= {"too_short" if self.prompt_tokens is not None else "too_long": 0, "empty": 0}
        make = self.whole if self.prompt_tokens is None else self._openings
        held_out: set[tuple[int, ...]] = set()
        if split == "train" and self.prompt_tokens is not None:  # whole texts are split, and openings may agree
            counts["leaked_openings"] = 0
            held_out = {tuple(prompt.ids) for name in ("validation", "test") for prompt in self.prompts(name)}
        for start, rows in in_chunks(self.source.rows(split), "tokenising prompts"):
            for number, (row, made) in enumerate(zip(rows, make(rows), strict=True), start):
                if made is None:
                    counts["too_short"] += 1
                    continue
                text, ids = made
                if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
                    if self.on_long == "error":
                        raise DataError(
                            f"{row.where}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens="
                            f"{self.max_prompt_tokens}: raise it, or set data.on_long=skip to leave long prompts out"
                        )
                    counts["too_long"] += 1
                    continue
                counts["empty"] += not ids
                prompt = self.prompt(row, text, ids)
                if tuple(prompt.ids) in held_out:
                    counts["leaked_openings"] += 1
                else:
                    yield number, row, prompt

    def _openings(self, rows: list[Row]) -> Iterator[tuple[str, list[int]] | None]:
        """Yield the text and the ids of each row's opening, None for a row that is too short to have one."""
        assert self.prompt_tokens is not None
        for ids in self._first_ids(rows, self.prompt_tokens + 1):
            opening = ids[: self.prompt_tokens]
            yield None if len(ids) <= self.prompt_tokens else (self.tokenizer.decode(opening), opening)

    def _first_ids(self, rows: list[Row], num_tokens: int) -> list[list[int]]:
        """Return at least the first `num_tokens` ids of each row, or all that it has.

        Only so many words of a text are encoded, cut where a word ends: tokenizers that split at white space first
        (every byte-level BPE) give the ids that the whole text begins with. Whole reviews would take 30 s.
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
        """Yield the text and the ids of each row, rendered where it is a conversation."""
        plain = [row for row in rows if row.messages is None]
        encoded = encode_texts([row.text for row in plain], [row.where for row in plain], tokenizer=self.tokenizer)
        for row in rows:
            yield (row.text, next(encoded)) if row.messages is None else rendered(row, tokenizer=self.tokenizer)

    def prompt(self, row: Row, text: str, ids: list[int]) -> Prompt:
        """Return a prompt of these ids; where there are none, the end-of-text token."""
        if not ids:
            if self.tokenizer.eos_id is None:
                raise DataError(
                    f"{row.where}: an empty prompt starts from the end-of-text token, and this tokenizer has none: "
                    f"leave empty prompts out, or use another tokenizer"
                )
            ids = [self.tokenizer.eos_id]
        return Prompt(text, ids, row.columns, row.where, row.messages)


def rendered(row: Row, *, tokenizer: Encoder) -> tuple[str, list[int]]:
    """Return the text and the ids of a conversation, by the chat template; raises `DataError` without one."""
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
    from jinja2 import TemplateError  # here, as only conversations need it

    try:
        text = hf.apply_chat_template(list(row.messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(f"{row.where}: the tokenizer's chat template refuses this conversation: {error}") from error
    return text, hf(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
