from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer

from rlft.core.errors import ConfigError
from rlft.core.paths import resolve
from rlft.text.backend import BackendTokenizer
from rlft.text.bpe import trained_bpe
from rlft.text.characters import characters
from rlft.text.huggingface import huggingface


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # HF_HUB_OFFLINE and HF_HUB_CACHE are read once, at import, into these variables.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize("path", ["gpt2", "nobody/nothing", "not a name"])
def test_without_the_hub_the_error_names_the_ways_on(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        huggingface(path)
    for words in [f"path={path!r}", "local directory", "model=tiny"]:
        assert words in str(caught.value)


def test_a_directory_that_does_not_exist_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        huggingface(str(tmp_path / "absent"))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        huggingface(str(tmp_path))


def test_a_directory_with_only_a_model_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r"empty vocabulary.*tokenizer\.json is missing"):
        huggingface(str(tmp_path))


def test_a_damaged_tokenizer_file_is_refused(tmp_path: Path) -> None:
    characters(alphabet="abc").save(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(ConfigError, match="holds no tokenizer that can be loaded"):
        huggingface(str(tmp_path))


def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    characters(alphabet="abc").save(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: pass\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "code.T"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(ConfigError):
        huggingface(str(tmp_path))
    assert not ran.exists()


def test_a_directory_inside_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pretend_package"
    (package / "assets").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    characters(alphabet="abc").save(package / "assets" / "letters")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert huggingface("package:pretend_package/assets/letters").encode("cab") == [2, 0, 1]


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


# Files beside a tokenizer.json, and whether the tokenizer.json alone then determines the ids of a text.
BESIDE: dict[str, tuple[Callable[[Path], None], bool]] = {
    "nothing": (lambda d: None, True),
    "a GPT-2": (lambda d: edit(d / "config.json", model_type="gpt2"), True),
    "a Llama": (lambda d: edit(d / "config.json", model_type="llama"), False),
    "the older class": (lambda d: edit(d / CONFIG, tokenizer_class="PreTrainedTokenizerFast"), True),
    "a class of its own": (lambda d: edit(d / CONFIG, tokenizer_class="GPT2Tokenizer"), False),
    "a pad token that is there": (lambda d: edit(d / CONFIG, pad_token="<|endoftext|>"), True),
    "a pad token to be added": (lambda d: edit(d / CONFIG, pad_token="<pad>"), False),
    "another end": (lambda d: edit(d / CONFIG, eos_token="</s>"), False),
    "no end": (lambda d: edit(d / CONFIG, eos_token=None), True),
    "more tokens": (lambda d: edit(d / CONFIG, extra_special_tokens=["<tool>"]), False),
    "a space before each text": (lambda d: edit(d / CONFIG, add_prefix_space=True), False),
    "a chat template": (lambda d: edit(d / CONFIG, chat_template="{{ messages }}"), True),
    "a file of special tokens": (lambda d: edit(d / "special_tokens_map.json", pad_token="<pad>"), False),
    "a file of added tokens": (lambda d: edit(d / "added_tokens.json", **{"<x>": 300}), False),
}
CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize("name", BESIDE)
def test_with_or_without_transformers_the_tokenizer_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLFT_CACHE", str(tmp_path / "cache"))
    source = SimpleNamespace(rows=lambda split: [SimpleNamespace(text="a good film " * 9, where="here")])
    trained_bpe(source=source, vocab_size=262).save(tmp_path / "saved")
    change, is_plain = BESIDE[name]
    change(tmp_path / "saved")
    auto = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    expected = BackendTokenizer.of(auto)
    loads = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: loads.append(1) or auto)
    found = huggingface(str(tmp_path / "saved"))
    assert loads == ([] if is_plain else [1])
    text = "a good film, <|endoftext|> </s> <pad> 🙂"
    assert found.encode(text) == expected.encode(text)
    assert (found.vocab, found.eos_token, found.eos_id) == (expected.vocab, expected.eos_token, expected.eos_id)
    assert (found.fingerprint, found.special_tokens) == (expected.fingerprint, expected.special_tokens)
    assert found.hf is auto  # it serves for chat templates and for saving


def test_what_ships_is_saved_as_it_is(tmp_path: Path) -> None:
    huggingface("package:rlft/assets/tiny").save(tmp_path)
    ours = Path(resolve("package:rlft/assets/tiny"))
    assert (tmp_path / "tokenizer.json").read_bytes() == (ours / "tokenizer.json").read_bytes()
    assert (
        json.loads((tmp_path / CONFIG).read_text()).items()
        >= {
            name: value for name, value in json.loads((ours / CONFIG).read_text()).items() if "local" not in name
        }.items()
    )  # these tell whether the hub was asked


def test_an_error_of_the_hubs_http_library_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    of_http = next(kind for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))

    def unreachable(*_: Any, **__: Any) -> None:
        raise of_http("no route to the hub")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match=r"could not be had from the Hugging Face hub .*no route to the hub"):
        huggingface("gpt2")
