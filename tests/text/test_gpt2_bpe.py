"""GPT-2's tokens through tiktoken, against transformers' own GPT-2 tokenizer made from the same published files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from rlft.core.errors import ConfigError
from rlft.models.gpt2 import GPT2, GPT2Config
from rlft.text import gpt2_bpe as module
from rlft.text.backend import BackendTokenizer
from rlft.text.characters import characters
from rlft.text.gpt2_bpe import EOS, Tiktoken, gpt2_bpe
from rlft.text.tokenizer import Tokenizer

# What GPT-2's pattern distinguishes: letters, digits, marks, many kinds of white space, and parts of contractions.
PIECES = [*"aBéßж字かไ한ا4١²Ⅷ½'’!?_-🙂", "'s", "'S", "'ll", "'l", "👩\u200d👧", "🏳\ufe0f\u200d🌈"]
CONTROL = ["\0", "\x1b", "\x1c", "\x7f", "\u0301", "\u200b", "\u202e", "\ufeff", "\ufffd", "\U0010ffff"]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\v", "\x85", "\u00a0", "\u180e", "\u2003", "\u2028", "\u3000"]
TEXTS = st.one_of(
    st.text(),  # any character but surrogates
    st.lists(st.sampled_from([*PIECES, *CONTROL, *SPACES, EOS, EOS[:-1]])).map("".join),
)


@pytest.fixture(scope="module")
def tokenizer(gpt2_files: str) -> Tokenizer:
    return gpt2_bpe(path=gpt2_files)


@pytest.fixture(scope="module")
def peer(gpt2_files: str) -> BackendTokenizer:
    vocab = json.loads((Path(gpt2_files) / "encoder.json").read_text(encoding="utf-8"))
    lines = (Path(gpt2_files) / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges: Any = [tuple(line.split(" ")) for line in lines[1:] if line]
    return BackendTokenizer.of(GPT2Tokenizer(vocab=vocab, merges=merges))


def hugging_face_files(gpt2_files: str, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(gpt2_files) / "encoder.json", directory / "vocab.json")
    shutil.copy(Path(gpt2_files) / "vocab.bpe", directory / "merges.txt")
    return directory


def without_network(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[str]:
    """Make every download fail, and return the list of requested addresses."""
    asked: list[str] = []

    def get(url: str, **_: Any) -> None:
        asked.append(url)
        raise requests.ConnectionError(f"no way to {url}")

    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # forget what this process has loaded
    return asked


def test_ids_are_those_that_openai_published(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 50257
    assert tokenizer.eos_id == 50256
    assert tokenizer.encode("hello world") == [31373, 995]
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert tokenizer.encode("\n") == [198]


@pytest.mark.parametrize(
    ("first", "last"), [(0, 0xD7FF), (0xE000, 0x1FFFF), pytest.param(0x20000, 0x10FFFF, marks=pytest.mark.slow)]
)
def test_every_character_gives_the_ids_of_transformers(
    tokenizer: Tokenizer, peer: BackendTokenizer, first: int, last: int
) -> None:
    """Each library has its own Unicode tables; the class of a character decides the ids beside a letter or space."""
    code_points = range(first, last + 1)
    texts = ["".join(f"a{chr(c)} {chr(c)}" for c in code_points[i : i + 999]) for i in range(0, len(code_points), 999)]
    assert tokenizer.encode_batch(texts) == peer.encode_batch(texts)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_any_text_gives_the_ids_of_transformers_and_comes_back(
    tokenizer: Tokenizer, peer: BackendTokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == peer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 50256 not in ids


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 255), st.integers(0, 50256), st.just(50256), st.integers(50257, 50400))))
def test_any_ids_give_the_text_of_transformers(tokenizer: Tokenizer, peer: BackendTokenizer, ids: list[int]) -> None:
    text = peer.decode(ids)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


@pytest.mark.parametrize("before", ["", "a", "a\n"])
@pytest.mark.parametrize("behind", ["", "b", "'s", "\u0301"])
@pytest.mark.parametrize("space", [" ", " \n", "\u3000", "\r\n"])
def test_white_space_too_long_for_tiktokens_pattern_is_cut_where_a_token_ends(
    tokenizer: Tokenizer, peer: BackendTokenizer, monkeypatch: pytest.MonkeyPatch, before: str, space: str, behind: str
) -> None:
    text = before + space * 300 + behind
    text += text  # the second copy begins in the middle of a text
    whole = tokenizer.encode(text)
    assert whole == peer.encode(text)
    monkeypatch.setattr(module, "_LONG", 100)
    monkeypatch.setattr(module, "_SPACES", module.re.compile(module._SPACES.pattern.replace("100000", "100")))
    assert len(module._parts(text)) > 1 or not before + behind
    assert tokenizer.encode(text) == whole


def test_two_million_spaces_before_a_word_are_encoded(tokenizer: Tokenizer, peer: BackendTokenizer) -> None:
    text = " \n" * 1_000_000 + "word"  # without the cut, tiktoken's pattern runs out of stack
    assert tokenizer.encode(text) == peer.encode(text)


def test_the_fingerprint_and_the_vocabulary_are_those_of_transformers(
    tokenizer: Tokenizer, peer: BackendTokenizer
) -> None:
    assert tokenizer.fingerprint == peer.fingerprint  # so that one finds what the other has cached
    assert tokenizer.vocab == peer.vocab


def test_half_a_character_is_shown_as_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])


def test_a_stream_shows_no_half_of_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("so🙂 it is")
    pieces = list(tokenizer.decode_stream(iter(ids)))
    assert pieces == ["so", "🙂", " it", " is"]
    assert list(tokenizer.decode_stream(ids[:2]))[-1] == "\ufffd"  # an incomplete character is shown at the end


def test_tiktokens_cache_serves_without_a_network(
    gpt2_files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    asked = without_network(monkeypatch, tmp_path)
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
    for name in ("vocab.bpe", "encoder.json"):  # tiktoken names a file by the hash of its address
        shutil.copy(Path(gpt2_files) / name, tmp_path / hashlib.sha1(f"{url}/{name}".encode()).hexdigest())
    assert gpt2_bpe().encode("hello world") == [31373, 995]
    assert asked == []


@pytest.mark.parametrize("model", [None, "gpt2", "gpt2-xl", "openai-community/gpt2"])
def test_without_network_and_files_the_error_names_the_ways_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    assert without_network(monkeypatch, tmp_path) == []
    with pytest.raises(ConfigError) as caught:
        gpt2_bpe(model=model)
    for words in ["model.tokenizer.path=/dir", "vocab.bpe and encoder.json", "vocab.json and merges.txt",
                  "model.path=/dir", "TIKTOKEN_CACHE_DIR=/dir", "model=tiny"]:  # fmt: skip
        assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("form", ["openai", "hugging face", "tokenizer.json"])
def test_each_form_of_the_published_files_gives_the_same(
    gpt2_files: str, tokenizer: Tokenizer, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = gpt2_files
    if form == "hugging face":
        directory = str(hugging_face_files(gpt2_files, tmp_path))
    elif form == "tokenizer.json":
        tokenizer.save(tmp_path)
        directory = str(tmp_path)
    without_network(monkeypatch, tmp_path / "no cache")
    made = gpt2_bpe(path=directory)
    assert isinstance(made, Tiktoken)
    assert made.vocab == tokenizer.vocab


def damaged(name: str, directory: Path) -> None:
    if name == "one token short":
        vocab = json.loads((directory / "vocab.json").read_text())
        del vocab["Ġgazed"]
        (directory / "vocab.json").write_text(json.dumps(vocab))
    elif name == "two ids swapped":
        vocab = json.loads((directory / "vocab.json").read_text())
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (directory / "vocab.json").write_text(json.dumps(vocab))
    elif name == "two merges swapped":
        lines = (directory / "merges.txt").read_text().split("\n")
        lines[1:3] = lines[2:0:-1]
        (directory / "merges.txt").write_text("\n".join(lines))
    elif name == "no merges":
        (directory / "merges.txt").unlink()
    elif name == "an added token":
        (directory / "added_tokens.json").write_text('{"<pad>": 50257}')
    elif name == "a space before each text":
        (directory / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    elif name == "no JSON":
        (directory / "vocab.json").write_text("{")
    else:
        shutil.rmtree(directory)
        directory.mkdir()


DAMAGED = ["one token short", "two ids swapped", "two merges swapped", "no merges", "an added token",
           "a space before each text", "no JSON", "empty"]  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_directory_that_holds_another_tokenizer_is_refused(gpt2_files: str, tmp_path: Path, name: str) -> None:
    hugging_face_files(gpt2_files, tmp_path)
    assert gpt2_bpe(path=str(tmp_path)).encode("hello world") == [31373, 995]
    damaged(name, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.tokenizer\.path=.* no files of GPT-2's tokenizer"):
        gpt2_bpe(path=str(tmp_path))


@pytest.mark.parametrize("path", ["gpt2", "absent/of/all"])
def test_a_path_that_is_no_directory_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"no directory|no such file or directory"):
        gpt2_bpe(path=path)


def model_at(directory: Path, *, vocab_size: int = 8) -> str:
    sizes = {"n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
    GPT2(GPT2Config(vocab_size=vocab_size, **sizes)).save_hf(directory)
    return str(directory)


def test_a_models_own_tokenizer_is_kept(gpt2_files: str, tmp_path: Path) -> None:
    own = characters(alphabet="abcdefg")
    own.save(tmp_path)
    model = model_at(tmp_path)
    assert gpt2_bpe(model=model).vocab == own.vocab
    with pytest.raises(ConfigError, match=r"leave model\.tokenizer\.path out"):
        gpt2_bpe(model=model, path=gpt2_files)


def test_a_model_with_gpt2s_own_files_needs_no_network(
    gpt2_files: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch, tmp_path / "no cache")
    hugging_face_files(gpt2_files, tmp_path / "published")
    published = gpt2_bpe(model=model_at(tmp_path / "published"))
    openais = gpt2_bpe(model=model_at(Path(shutil.copytree(gpt2_files, tmp_path / "openai"))))
    tokenizer.hf.chat_template = "{{ messages[0].content }}"
    try:
        tokenizer.save(tmp_path / "exported")
    finally:
        tokenizer.hf.chat_template = None
    exported = gpt2_bpe(model=model_at(tmp_path / "exported"))
    for made in (published, openais, exported):
        assert isinstance(made, Tiktoken)
        assert made.encode("hello world") == [31373, 995] == made.hf("hello world")["input_ids"]
    assert exported.hf.chat_template == "{{ messages[0].content }}"  # the model's other settings are kept
    assert published.hf.chat_template is None


def test_a_model_without_a_tokenizer_gets_gpt2s(gpt2_files: str, tmp_path: Path) -> None:
    assert isinstance(gpt2_bpe(model=model_at(tmp_path), path=gpt2_files), Tiktoken)
