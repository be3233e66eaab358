from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.data import shakespeare
from rlft.data.shakespeare import Shakespeare
from rlft.data.source import SPLITS

REAL = Path("/work/shared/data/tinyshakespeare.txt")
PLAY = "".join(f"KING {i}:\nInvented speech number {i},\nof two lines.\n\n" for i in range(100))


@pytest.fixture
def play(tmp_path, monkeypatch):
    """An invented play that is accepted as the corpus."""
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    return str(path)


def test_splits_are_the_text_by_position(play):
    source = Shakespeare(path=play)
    parts = [source.rows(split)[0].text for split in SPLITS]
    assert "".join(parts) == PLAY
    assert parts[0] == PLAY[: int(len(PLAY) * 0.9)]
    assert abs(len(parts[1]) - len(parts[2])) <= 1
    assert source.counts == {"rows": 3, "duplicates": 0, "leaked": 0, "train": 1, "validation": 1, "test": 1}


def test_splits_without_a_share_are_empty(play):
    source = Shakespeare(path=play, validation=0.0, test=0.0)
    assert [row.text for row in source.rows("train")] == [PLAY]
    assert source.rows("validation") == source.rows("test") == []


def test_speeches_keep_their_lines_and_places(play):
    rows = [row for split in SPLITS for row in Shakespeare(path=play, documents="speeches").rows(split)]
    assert [row.text for row in rows] == [f"KING {i}:\nInvented speech number {i},\nof two lines." for i in range(100)]
    assert [row.where for row in rows[:2]] == ["play.txt:1", "play.txt:5"]
    assert "\n\n".join(row.text for row in rows) + "\n\n" == PLAY


def test_another_text_is_refused(play):
    Path(play).write_text(PLAY + "more")
    with pytest.raises(DataError, match=r"play.txt is not tiny Shakespeare.*SHA-256.*data/source=text_file"):
        Shakespeare(path=play).rows("train")


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent.txt: No such file"):
        Shakespeare(path=str(tmp_path / "absent.txt")).rows("train")


@pytest.mark.usefixtures("play")
def test_download_happens_once_and_is_kept(monkeypatch, own_cache):
    asked = []

    def answer(url, **_):
        asked.append(url)
        return io.BytesIO(PLAY.encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert Shakespeare().rows("test") == Shakespeare().rows("test")
    assert asked == [shakespeare.URL]
    assert (own_cache / "tinyshakespeare.txt").read_text() == PLAY


def test_wrong_download_is_refused_and_not_kept(monkeypatch, own_cache):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>sign in</html>"))
    with pytest.raises(DataError, match="is not tiny Shakespeare"):
        Shakespeare().rows("train")
    assert list(own_cache.iterdir()) == []


def test_download_without_network_says_how_to_give_a_path(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(DataError, match=r"cannot be downloaded.*set data.source.path=FILE"):
        Shakespeare().rows("train")


def test_unknown_documents_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'speeches'"):
        Shakespeare(documents="speech")


@pytest.mark.skipif(not REAL.is_file(), reason="the corpus is not on this machine")
def test_real_corpus_has_its_published_sizes():
    source = Shakespeare(path=str(REAL))
    assert len(source.rows("train")[0].text) == 1_003_854  # nanoGPT's training split
    speeches = Shakespeare(path=str(REAL), documents="speeches")
    assert speeches.counts["rows"] == 7222
    texts = [row.text for split in SPLITS for row in speeches.rows(split)]
    assert len(texts) == len(set(texts))
