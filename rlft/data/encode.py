"""Encodes many texts at once; an error names the place of the text that the tokenizer refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rlft.core.errors import DataError
from rlft.data.progress_bar import reported
from rlft.data.source import Row

CHUNK = 1024  # texts encoded at once; it bounds the memory that lists of Python integers take


class Encoder(Protocol):
    """The part of `rlft.text.tokenizer.Tokenizer` that the data sets use."""

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
    """Return what the ids of a text depend on (JSON values), for a cache key."""
    return {"tokenizer": tokenizer.fingerprint, "eos": tokenizer.eos_id}


def chat_key(tokenizer: Encoder) -> Any:
    """Return what the ids of a conversation depend on in addition (JSON values), for a cache key."""
    hf = tokenizer.hf
    return (
        None if hf.chat_template is None else [hf.chat_template, {k: str(v) for k, v in hf.special_tokens_map.items()}]
    )


def in_chunks(rows: Sequence[Row], what: str) -> Iterator[tuple[int, list[Row]]]:
    """Yield (number of the chunk's first row, rows of the chunk); stderr shows the progress of `what`.

    Raises `DataError` for a source of another's making that gives something else than rows.
    """
    with reported(what, len(rows), unit="texts") as advance:
        for start in range(0, len(rows), CHUNK):
            chunk = list(rows[start : start + CHUNK])
            if not isinstance(chunk[0], Row):
                kind = type(chunk[0]).__name__
                raise DataError(
                    f"data.source gives {kind}s; a source's rows are rlft.data.source.Row, as in data/tasks.py"
                )
            yield start, chunk
            advance(len(chunk))


def encode_texts(texts: Sequence[str], places: Sequence[str], *, tokenizer: Encoder) -> Iterator[list[int]]:
    """Yield the ids of each text; raises `DataError` with the place of a text that the tokenizer refuses."""
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
