"""What every tokenizer must do; the tests of one kind of tokenizer are in its own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer

from rlft.core.errors import ConfigError, DataError
from rlft.text import tokenizer as tokenizer_module
from rlft.text.backend import BackendTokenizer
from rlft.text.bpe import trained_bpe
from rlft.text.characters import characters
from rlft.text.gpt2_bpe import gpt2_bpe
from rlft.text.huggingface import huggingface
from rlft.text.tokenizer import Tokenizer

AWKWARD = {
    "empty": "",
    "plain": "hello world",
    "spaces": "  two  before , and three   after   ",
    "contractions": "do n't , don't ; we 'll",
    "emoji": "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "combining": "e\u0301 a\u0308\u0304 Z\u0351\u036b\u0343",
    "composed and not": "\u00e9 e\u0301 \ufb01 \u2126",
    "control": "\x00\x01\x07\x08\x1b[31m\x7f\x85",
    "end of text": "<|endoftext|>",
    "end of text inside": "a<|endoftext|>b <|endoftext|>",
    "newlines": "\n\na\n \nb\n",
    "crlf": "a\r\nb\rc\n\r",
    "tabs": "\ta\t\tb \t",
    "right to left": "שלום עולם \u202eabc\u202c مرحبا",
    "odd spaces": "\u00a0\u2003\u200b\u2028\u3000\ufeff",
    "other scripts": "日本語 ไทย नमस्ते",
    "outside the first plane": "𝔘𐍈\U0010ffff",
    "replacement": "\ufffd",
    "long": "It was, in the end, a film. 🙂\n" * 35_000,  # 1.05 MB of characters
    "one long word": "x" * 1_000_000,
}


@dataclass
class FakeRow:
    text: str
    where: str = "fake:1"


class FakeSource:
    def rows(self, split: str) -> list[FakeRow]:
        assert split == "train"
        return [FakeRow(text[:2000]) for text in AWKWARD.values()]


@pytest.fixture(scope="module", params=["gpt2", "characters", "bpe", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "characters":
        return characters(source=FakeSource())
    if request.param == "gpt2":
        return gpt2_bpe(path=request.getfixturevalue("gpt2_files"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        trained = trained_bpe(source=FakeSource(), vocab_size=400)
    if request.param == "bpe":
        return trained
    directory = tmp_path_factory.mktemp("saved")
    trained.save(directory)
    return huggingface(str(directory))


@pytest.mark.parametrize("name", AWKWARD)
def test_decoding_what_was_encoded_gives_the_text(tokenizer: Tokenizer, name: str) -> None:
    ids = tokenizer.encode(AWKWARD[name])
    assert tokenizer.decode(ids) == AWKWARD[name]
    assert all(0 <= i < tokenizer.vocab_size for i in set(ids))


@pytest.mark.parametrize("name", [name for name in AWKWARD if "long" not in name])
def test_no_text_encodes_to_the_end_token(tokenizer: Tokenizer, name: str) -> None:
    assert tokenizer.eos_id not in tokenizer.encode(AWKWARD[name])


def test_the_end_token_is_the_last_id_and_is_not_shown(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 == len(tokenizer.hf) - 1
    assert tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "hello"


def test_a_batch_is_each_text_alone_across_chunks(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in AWKWARD.values() if len(text) < 1000]
    alone = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer_module, "BATCH", 3)
    assert tokenizer.encode_batch(texts) == alone
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode_batch(alone) == texts


def test_decode_takes_lists_arrays_and_tensors(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids)) == tokenizer.decode(torch.tensor(ids))
    assert tokenizer.decode([]) == tokenizer.decode(torch.tensor([], dtype=torch.long)) == ""


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_auto_tokenizer_gives_the_same_ids_after_save(
    tokenizer: Tokenizer, tmp_path: Path, beside_a_model: bool
) -> None:
    tokenizer.save(tmp_path)
    if beside_a_model:  # transformers may choose the tokenizer's class by the type of the model
        eos = tokenizer.eos_id
        GPT2Config(vocab_size=tokenizer.vocab_size, bos_token_id=eos, eos_token_id=eos).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (len(loaded), loaded.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    for name, text in AWKWARD.items():
        if "end of text" not in name and len(text) < 1000:
            assert loaded(text)["input_ids"] == tokenizer.encode(text), name
            assert loaded.decode(tokenizer.encode(text)) == text, name


def test_loading_what_was_saved_gives_the_same_ids_and_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = huggingface(str(tmp_path))
    for name, text in AWKWARD.items():
        if len(text) < 1000:
            assert loaded.encode(text) == tokenizer.encode(text), name
    assert loaded.fingerprint == tokenizer.fingerprint


def test_fingerprint_does_not_depend_on_what_was_encoded_before(tokenizer: Tokenizer) -> None:
    before = tokenizer.fingerprint
    tokenizer.encode("hello <|endoftext|>")
    tokenizer.hf("hello", truncation=True, max_length=2)
    tokenizer.encode("hello")
    assert tokenizer.fingerprint == before


def test_a_call_of_transformers_that_reads_special_tokens_changes_no_later_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.hf("<|endoftext|>", split_special_tokens=False)["input_ids"] == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.hf("<|endoftext|>", split_special_tokens=False)["input_ids"] == [tokenizer.eos_id]


def test_the_vocabulary_and_the_special_tokens_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab == tokenizer.hf.get_vocab()
    assert tokenizer.special_tokens == tokenizer.hf.all_special_tokens


@pytest.mark.parametrize("name", [name for name in AWKWARD if "long" not in name])
def test_a_stream_of_ids_gives_the_text_piece_by_piece(tokenizer: Tokenizer, name: str) -> None:
    ids = tokenizer.encode(AWKWARD[name])
    pieces = list(tokenizer.decode_stream(iter(ids)))
    assert "".join(pieces) == AWKWARD[name]
    assert all(pieces)
    assert name == "replacement" or not any("\ufffd" in piece for piece in pieces)


def test_a_truncation_set_by_another_caller_cuts_nothing(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("hello world " * 20)
    tokenizer.hf("hello world", truncation=True, max_length=2)
    assert tokenizer.encode("hello world " * 20) == whole


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"text 1.*U\+D83D"):
        tokenizer.encode_batch(["hello", "he\ud83d"])


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty vocabulary"):
        BackendTokenizer.of(GPT2Tokenizer(vocab_file="vocab.json", merges_file="merges.txt"))
