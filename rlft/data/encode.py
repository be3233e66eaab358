"""Texts to ids, many at once, with the place of a text that the tokenizer refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rlft.core.errors import DataError
from rlft.data.progress_bar import reported
from rlft.data.source import Row

CHUNK = 1024  # texts at once: bounds the memory that lists of Python integers take


class Encoder(Protocol):
    """What the data sets need of a tokenizer (`rlft.text.tokenizer.Tokenizer` has it)."""

    vocab_size: int
    eos_id: int | None

    @property
    def hf(self) -> Any: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def vocab(self) -> dict[str, int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


def tokenizer_key(tokenizer: Encoder) -> dict[str, Any]:
    """Return what the ids of a text depend on (JSON values), for the key of what is kept."""
    return {"tokenizer": tokenizer.fingerprint, "eos": tokenizer.eos_id}


def chat_key(tokenizer: Encoder) -> Any:
    """Return what the ids of a conversation depend on beside those of its text."""
    hf = tokenizer.hf
    return (
        None if hf.chat_template is None else [hf.chat_template, {k: str(v) for k, v in hf.special_tokens_map.items()}]
    )


def in_chunks(rows: Sequence[Row], what: str) -> Iterator[tuple[int, list[Row]]]:
    """Yield the rows, some at once, with the number of the first; a long list shows on stderr as `what`."""
    with reported(what, len(rows), unit="texts") as advance:
        for start in range(0, len(rows), CHUNK):
            chunk = list(rows[start : start + CHUNK])
            yield start, chunk
            advance(len(chunk))


def encode_texts(texts: Sequence[str], places: Sequence[str], *, tokenizer: Encoder) -> Iterator[list[int]]:
    """Yield the ids of each text; a text that the tokenizer refuses raises `DataError` with its place."""
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        try:
            encoded = tokenizer.encode_batch(chunk)
        except ValueError:
            _raise_for_first(chunk, places[start : start + CHUNK], tokenizer)
            raise
        yield from encoded


def _raise_for_first(texts: Sequence[str], places: Sequence[str], tokenizer: Encoder) -> None:
    for text, place in zip(texts, places, strict=True):
        try:
            tokenizer.encode_batch([text])
        except ValueError as error:
            raise DataError(f"{place}: the tokenizer cannot encode this text: {error}") from error
