"""Prompts: what the policy is asked to continue, as text and as ids, with the columns that the rewards see."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlft.core.ranges import Size, SizeOrZero
from rlft.counted import order
from rlft.data.encode import Encoder, encode_texts
from rlft.data.kinds import Kind
from rlft.data.source import Row, Source, check_split
from rlft.errors import ConfigError, DataError, nearest

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
        if on_long not in ON_LONG:
            raise ConfigError(f"on_long is one of {', '.join(ON_LONG)}, got {on_long!r}{nearest(on_long, ON_LONG)}")
        self.source, self.tokenizer = source, tokenizer
        self.prompt_tokens, self.max_prompt_tokens, self.on_long = prompt_tokens, max_prompt_tokens, on_long
        self._made: dict[str, tuple[list[Prompt], dict[str, int]]] = {}

    def prompts(self, split: str) -> list[Prompt]:
        """Return the prompts of a split in the source's order; they are tokenised at the first call."""
        return self._make(split)[0]

    def batch(self, step: int, *, size: int, seed: int) -> list[Prompt]:
        """Return the `size` training prompts of a step: a function of its arguments only, each epoch a permutation."""
        prompts = self.prompts("train")
        if not prompts:
            raise DataError(f"the train split has no prompt ({self._make('train')[1]}): give more rows or shorter ones")
        return [prompts[index] for index in order(len(prompts), seed=seed, start=step * size, count=size)]

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

    def _make(self, split: str) -> tuple[list[Prompt], dict[str, int]]:
        if check_split(split) not in self._made:
            rows = self.source.rows(split)
            make = self._whole if self.prompt_tokens is None else self._openings
            self._made[split] = make(rows)
            if split == "train" and self.prompt_tokens is not None:
                self._made[split] = self._without_held_out(*self._made[split])
        return self._made[split]

    def _without_held_out(self, prompts: list[Prompt], counts: dict[str, int]) -> tuple[list[Prompt], dict[str, int]]:
        """Leave out the openings that a held-out text has too: whole texts are split, and openings may agree."""
        held_out = {tuple(prompt.ids) for split in ("validation", "test") for prompt in self._make(split)[0]}
        kept = [prompt for prompt in prompts if tuple(prompt.ids) not in held_out]
        return kept, counts | {"leaked_openings": len(prompts) - len(kept)}

    def _openings(self, rows: list[Row]) -> tuple[list[Prompt], dict[str, int]]:
        assert self.prompt_tokens is not None
        prompts, counts = [], {"too_short": 0, "empty": 0}
        for row, ids in zip(rows, self._first_ids(rows, self.prompt_tokens + 1), strict=True):
            if len(ids) <= self.prompt_tokens:
                counts["too_short"] += 1
                continue
            ids = ids[: self.prompt_tokens]
            counts["empty"] += not ids
            prompts.append(self._prompt(row, self.tokenizer.decode(ids), ids))
        return prompts, counts

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

    def _whole(self, rows: list[Row]) -> tuple[list[Prompt], dict[str, int]]:
        plain = [row for row in rows if row.messages is None]
        encoded = encode_texts([row.text for row in plain], [row.where for row in plain], tokenizer=self.tokenizer)
        prompts, counts = [], {"too_long": 0, "empty": 0}
        for row in rows:
            text, ids = (row.text, next(encoded)) if row.messages is None else self._rendered(row)
            if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
                if self.on_long == "error":
                    raise DataError(
                        f"{row.where}: the prompt has {len(ids)} tokens, more than max_prompt_tokens="
                        f"{self.max_prompt_tokens}: raise it, or set on_long=skip to leave long prompts out"
                    )
                counts["too_long"] += 1
                continue
            counts["empty"] += not ids
            prompts.append(self._prompt(row, text, ids))
        return prompts, counts

    def _prompt(self, row: Row, text: str, ids: list[int]) -> Prompt:
        if not ids:
            if self.tokenizer.eos_id is None:
                raise DataError(
                    f"{row.where}: an empty prompt starts from the end-of-text token, and this tokenizer has none: "
                    f"leave empty prompts out, or use another tokenizer"
                )
            ids = [self.tokenizer.eos_id]
        return Prompt(text, ids, row.columns, row.where, row.messages)

    def _rendered(self, row: Row) -> tuple[str, list[int]]:
        """Return the text and the ids of a conversation."""
        assert row.messages is not None
        hf = self.tokenizer.hf
        if hf.chat_template is None:
            if len(row.messages) == 1 and row.messages[0]["role"] == "user":
                return row.text, next(encode_texts([row.text], [row.where], tokenizer=self.tokenizer))
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
