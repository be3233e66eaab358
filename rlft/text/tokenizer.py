"""One interface over every tokenizer: text to ids and back, with nothing added and nothing cut.

A thin wrapper over a fast `transformers` tokenizer. It differs from calling that one directly in three ways: no
special token is added; the text of a special token inside a user's text ("<|endoftext|>") stays ordinary text, so
that data cannot end a sequence; and decoding neither shows special tokens nor cleans up spaces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlft.errors import ConfigError, DataError

BATCH = 1024  # texts encoded at once: the backend holds about 100 bytes for each token until the ids are taken out


class Tokenizer:
    """Text to ids and back.

    Arguments:
        hf: a fast Hugging Face tokenizer (one with a `tokenizers` backend).

    Attributes:
        hf: the wrapped tokenizer, for a chat template or a `transformers` model.
        vocab_size: ids run from 0 to `vocab_size - 1`.
        eos_id, eos_token: the end-of-text token, or None where there is none.

    Raises `ConfigError` if `hf` is not a fast tokenizer or has an empty vocabulary.
    """

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        if not hf.is_fast:
            raise ConfigError(
                f"{type(hf).__name__} ({hf.name_or_path}) has no fast version, which is needed; "
                f"give a tokenizer that has a tokenizer.json"
            )
        vocab = hf.get_vocab()
        ordinary = len(vocab.keys() - set(hf.all_special_tokens))
        if ordinary == 0:
            raise ConfigError(
                f"{type(hf).__name__} ({hf.name_or_path}) has an empty vocabulary: its tokenizer.json is missing, or "
                f"its vocabulary was given under a name that this transformers does not know"
            )
        self.hf = hf
        self.vocab_size: int = max(vocab.values()) + 1  # len(hf), unless the ids have holes
        self.eos_token: str | None = hf.eos_token
        self.eos_id: int | None = hf.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; raises `DataError` (a `ValueError`) if it cannot be represented."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; the same as `encode` on each, and faster on many."""
        rows: list[list[int]] = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            for index, text in enumerate(batch, start):
                check_text(text, f"text {index}")
            encoded = self.hf(
                batch,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            rows.extend(encoded["input_ids"])
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, or an array or CPU tensor `[T]`), without special tokens."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Return the text of each row of ids; rows may differ in length."""
        lists = [np.asarray(row, dtype=np.int64).tolist() for row in rows]
        return self.hf.backend_tokenizer.decode_batch(lists, skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        """Write Hugging Face files, so that `AutoTokenizer.from_pretrained(directory)` gives the same ids."""
        self.hf.save_pretrained(str(directory))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the backend's JSON: equal for tokenizers that give the same ids. For cache keys."""
        backend = json.loads(self.hf.backend_tokenizer.to_str())
        for setting in ("truncation", "padding"):  # left over from the last call of `hf`, and of no effect on `encode`
            del backend[setting]
        return hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()


def check_text(text: str, where: str) -> None:
    """Raise `DataError` if `text` holds a lone surrogate: JSON can carry one, no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which stands for "
            f"no character; repair the data, for example with text.encode('utf-8', 'replace').decode()"
        ) from error
