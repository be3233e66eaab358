from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rlft.core.cache_dir import atomic_path, cache_dir, key_of_texts


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLFT_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert cache_dir().is_dir()
    monkeypatch.delenv("RLFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "rlft"


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.npy"
    for content in ["one", "two"]:
        with atomic_path(path) as temporary:
            temporary.write_text(content)
            assert temporary.suffix == ".npy"
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_key_of_texts_tells_apart_the_same_characters_cut_differently() -> None:
    class Texts:
        def __init__(self, *texts: str) -> None:
            self.texts = texts

        def rows(self, split: str) -> list[SimpleNamespace]:
            return [SimpleNamespace(text=text) for text in self.texts]

    assert key_of_texts(Texts("ab", "c"), "train") != key_of_texts(Texts("a", "bc"), "train")
