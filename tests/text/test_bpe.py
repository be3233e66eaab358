from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.text import bpe
from rlft.text.bpe import trained_bpe

WORDS = ("the a film was not bad good plot actor scene and of in it ended began slow 🙂 naïve don't").split()  # noqa: SIM905  easier to read


class FakeSource:
    def __init__(self, *, seed: int = 0, validation: str = "zyzzyva " * 100) -> None:
        draw = random.Random(seed)
        self.train = [" ".join(draw.choices(WORDS, k=20)) for _ in range(50)]
        self.validation = [validation]

    def rows(self, split: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(text=text, where=f"{split}:{n}") for n, text in enumerate(getattr(self, split), 1)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLFT_CACHE", str(tmp_path))
    return tmp_path


def test_the_vocabulary_has_the_size_asked_for() -> None:
    tokenizer = trained_bpe(source=FakeSource(), vocab_size=300)
    assert (tokenizer.vocab_size, tokenizer.eos_id, len(tokenizer.hf)) == (300, 299, 300)


def test_training_joins_what_is_frequent() -> None:
    tokenizer = trained_bpe(source=FakeSource(), vocab_size=330)
    assert len(tokenizer.encode(" film")) == 1
    assert len(tokenizer.encode(" zyzzyva")) > 4


def test_a_new_process_with_one_thread_and_no_cache_trains_the_same(tmp_path: Path) -> None:
    here = trained_bpe(source=FakeSource(), vocab_size=320)
    program = (
        "from test_bpe import FakeSource; from rlft.text.bpe import trained_bpe;"
        "print(trained_bpe(source=FakeSource(), vocab_size=320).fingerprint)"
    )
    fresh = {"RLFT_CACHE": str(tmp_path / "other"), "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **fresh, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here.fingerprint


def test_only_the_train_split_is_read() -> None:
    one = trained_bpe(source=FakeSource(validation="qqqq " * 500), vocab_size=300)
    two = trained_bpe(source=FakeSource(validation=""), vocab_size=300)
    assert one.fingerprint == two.fingerprint


def test_the_second_call_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained_bpe(source=FakeSource(), vocab_size=300)

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(bpe, "_train", fail)
    assert trained_bpe(source=FakeSource(), vocab_size=300).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="trained again"):
        trained_bpe(source=FakeSource(), vocab_size=301)
    with pytest.raises(AssertionError, match="trained again"):
        trained_bpe(source=FakeSource(seed=1), vocab_size=300)


def test_a_damaged_cache_file_is_named(cache: Path) -> None:
    trained_bpe(source=FakeSource(), vocab_size=300)
    (path,) = (cache / "tokenizers").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=f"{path.name} is damaged.*delete it"):
        trained_bpe(source=FakeSource(), vocab_size=300)


def test_more_ids_than_the_texts_give_are_refused_and_nothing_is_cached(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=5000: .* no more than (\d+) tokens; set vocab_size=\1 or less"):
        trained_bpe(source=FakeSource(), vocab_size=5000)
    assert list(cache.rglob("*.json")) == []


def test_fewer_ids_than_bytes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=256: .* at least 257"):
        trained_bpe(source=FakeSource(), vocab_size=256)
    assert trained_bpe(source=FakeSource(), vocab_size=257).encode("é") == trained_bpe(
        source=FakeSource(seed=1), vocab_size=257
    ).encode("é")


def test_a_text_that_is_not_unicode_is_refused_with_its_line() -> None:
    source = FakeSource()
    source.train[2] = "a\udc00"
    with pytest.raises(DataError, match=r"train:3: character 1 .*U\+DC00"):
        trained_bpe(source=source, vocab_size=300)
