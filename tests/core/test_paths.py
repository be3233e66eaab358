from __future__ import annotations

from pathlib import Path

import pytest

import rlft
from rlft.core.errors import ConfigError
from rlft.core.paths import resolve


def test_a_package_path_is_inside_the_installed_package() -> None:
    assert resolve("package:rlft/text") == Path(rlft.__file__).parent / "text"


def test_a_package_path_is_found_without_running_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "inner" / "model").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (tmp_path / "mine" / name).write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in ("package:mine/inner/model", "package:mine.inner/model"):
        assert resolve(path) == tmp_path / "mine" / "inner" / "model"


def test_a_bare_name_is_a_hub_name_until_such_a_directory_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2") == "gpt2"
    assert resolve("openai-community/gpt2") == "openai-community/gpt2"
    (tmp_path / "gpt2").mkdir()
    assert resolve("gpt2") == Path("gpt2")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize("path", ["/absent/model", "./absent", "../absent", "~/absent-model", "outputs/run/model", ""])
def test_a_local_path_that_does_not_exist_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file or directory"):
        resolve(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no_such_package/x", "'no_such_package' is not installed"),
        ("package:rlft/assets/absent", "holds no 'assets/absent'"),
        ("package:", "is not installed"),
    ],
)
def test_a_wrong_package_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(path)
