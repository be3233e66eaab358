"""One interface for every tokenizer: text to ids and back, with nothing added and nothing cut.

All tokenizers behave alike in three points where those of `transformers` may not. Encoding adds no special token. If a
text holds the name of a special token, such as "<|endoftext|>", it is encoded as ordinary text, so data cannot end a
sequence. Decoding leaves special tokens out and does not clean up spaces.

The tokenizer of `transformers` (`hf`) is made only when it is needed, because the import takes a second.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlft.core.errors import DataError

BATCH = 1024  # texts encoded at once; a backend needs about 100 bytes for each token of them
HALF = "\ufffd"  # decoded in place of a character of which some bytes are missing


class Texts(Protocol):
    """A source that a tokenizer is made from: the items of `rows("train")` have `text` and `where`."""

    def rows(self, split: str) -> Sequence[Any]: ...


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab: the id of each token, including special tokens.
        vocab_size: ids run from 0 to `vocab_size - 1`.
        special_tokens: tokens that no text encodes to and that decoding leaves out.
        eos_id, eos_token: the end-of-text token, or None if there is none.
    """

    vocab_size: int
    eos_token: str | None
    eos_id: int | None

    @property
    @abstractmethod
    def vocab(self) -> dict[str, int]: ...

    @property
    @abstractmethod
    def special_tokens(self) -> list[str]: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) for cache keys, equal for tokenizers that give the same ids."""

    @functools.cached_property
    def hf(self) -> Any:
        """The `transformers` tokenizer with the same ids, for its chat template and for saving."""
        return self._make_hf()

    @abstractmethod
    def _make_hf(self) -> Any: ...

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts without lone surrogates."""

    @abstractmethod
    def _decode(self, rows: list[list[int]]) -> list[str]: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; raises `DataError` (a `ValueError`) if it cannot be encoded."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; the same as `encode` of each, but faster."""
        rows: list[list[int]] = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            for index, text in enumerate(batch, start):
                check_text(text, f"text {index}")
            rows.extend(self._encode(batch))
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, an array, or a CPU tensor, `[T]`), without special tokens."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Return the text of each row of ids; rows may differ in length."""
        return self._decode([np.asarray(row, dtype=np.int64).tolist() for row in rows])

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` piece by piece as they arrive; the pieces add up to what `decode` returns for all.

        A character whose bytes are spread over several tokens is yielded after the last of these tokens.
        """
        seen: list[int] = []
        shown = 0
        for token in ids:
            seen.append(int(token))
            text = self.decode(seen).rstrip(HALF)
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        if rest := self.decode(seen)[shown:]:
            yield rest

    def save(self, directory: str | Path) -> None:
        """Write Hugging Face files, so that `AutoTokenizer.from_pretrained(directory)` gives the same ids."""
        self.hf.save_pretrained(str(directory))


def check_text(text: str, where: str) -> None:
    """Raise `DataError` if `text` holds a lone surrogate, which JSON can carry but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which stands for "
            f"no character; repair the data, for example with text.encode('utf-8', 'replace').decode()"
        ) from error
