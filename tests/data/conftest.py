"""Invented texts and a byte tokenizer, with which the expected ids are the bytes of the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from rlft.data.source import Row, split_rows

EOS = 256


class ByteTokenizer:
    """Ids are the bytes of the text, and 256 is the end of text; `calls` holds every text that was encoded."""

    def __init__(self, eos_id: int | None = EOS, refused: str = "\0") -> None:
        self.vocab_size, self.eos_id, self.refused = 257, eos_id, refused
        self.hf = SimpleNamespace(chat_template=None, all_special_tokens=[])
        self.fingerprint = f"bytes {eos_id}"
        self.calls: list[str] = []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.calls.extend(texts)
        if any(self.refused in text for text in texts):
            raise ValueError(f"{self.refused!r} is no character of this tokenizer")
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < EOS).decode()


class ListSource:
    """A source of the given texts, split by hash."""

    def __init__(self, texts: Sequence[str], *, validation: float = 0.2, test: float = 0.1) -> None:
        rows = [Row(text, {"length": len(text)}, f"list:{i}") for i, text in enumerate(texts, 1)]
        self.splits, counts = split_rows(rows, validation=validation, test=test)
        self.counts = {"rows": len(rows), **counts}

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]


@pytest.fixture
def make_tokenizer() -> type[ByteTokenizer]:
    return ByteTokenizer


@pytest.fixture
def make_source() -> type[ListSource]:
    return ListSource


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def invented() -> list[str]:
    """100 different sentences, of 22 to 119 characters."""
    things = ["kettle", "bridge", "lantern", "orchard", "violin", "harbour", "compass", "meadow", "anvil", "glacier"]
    sentence = "the {} beside a {} hums {}"
    return [
        sentence.format(a, b, "quietly " * ((i + j) % 9)) for i, a in enumerate(things) for j, b in enumerate(things)
    ]


@pytest.fixture
def write_jsonl(tmp_path) -> Callable[..., str]:
    def write(records: list, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write
