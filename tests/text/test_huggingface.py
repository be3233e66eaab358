from __future__ import annotations

import contextlib
import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from rlft.errors import ConfigError
from rlft.text.characters import characters
from rlft.text.huggingface import huggingface


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # HF_HUB_OFFLINE and HF_HUB_CACHE are read once, at import; these are where their values are kept.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize("path", ["gpt2", "nobody/nothing", "not a name"])
def test_without_the_hub_the_error_names_the_ways_on(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        huggingface(path)
    for words in [f"path={path!r}", "local directory", "rlft.text.gpt2.gpt2_bpe", "model=tiny"]:
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
