from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from rlft.core.errors import DataError
from rlft.data import store
from rlft.data.store import Lazy, Store, file_key, stored

ROWS = [b"one", b"", b"three"]


def write(writer):
    append = writer.ragged("rows")
    for row in ROWS:
        append(row)
    writer.array("order", np.array([2, 0], dtype=np.int64))
    return {"number": len(ROWS)}


def rows(entry: Store) -> list[bytes]:
    return [entry.row("rows", i).tobytes() for i in range(len(ROWS))]


def never(writer):
    raise AssertionError("written again")


def test_an_entry_is_written_once_and_opened_as_it_was_written(own_cache):
    stored("kind", {"a": 1}, write)
    again = stored("kind", {"a": 1}, never)
    assert rows(again) == ROWS and again.meta == {"number": 3}
    assert again.lengths("rows").tolist() == [3, 0, 5] and again.arrays["order"].tolist() == [2, 0]
    with pytest.raises(AssertionError, match="written again"):
        stored("kind", {"a": 2}, never)
    with pytest.raises(AssertionError, match="written again"):
        stored("other kind", {"a": 1}, never)
    assert [path.name.startswith("kind-") for path in (own_cache / "data").iterdir()] == [True]  # there is nothing else


def test_columns_longer_than_what_is_held_in_memory_are_whole(monkeypatch):
    monkeypatch.setattr(store, "FLUSH_ITEMS", 3)

    def numbers(writer):
        append = writer.ragged("ids", "int32")
        for i in range(20):
            append(list(range(i)))
        return {}

    entry = stored("numbers", {}, numbers)
    assert [entry.row("ids", i).tolist() for i in range(20)] == [list(range(i)) for i in range(20)]


@pytest.mark.parametrize("name", ["rows.npy", "rows_ends.npy", "order.npy", "meta.json"])
@pytest.mark.parametrize("keep", [0, -1, None])
def test_a_damaged_entry_is_made_again_and_says_so(own_cache, capsys, name, keep):
    stored("kind", {}, write)
    (path,) = (own_cache / "data").iterdir()
    (path / name).unlink() if keep is None else (path / name).write_bytes((path / name).read_bytes()[:keep])
    assert rows(stored("kind", {}, write)) == ROWS
    assert "is damaged" in capsys.readouterr().err
    assert rows(stored("kind", {}, never)) == ROWS
    assert list((own_cache / "data").iterdir()) == [path]


def test_a_failed_write_leaves_nothing(own_cache):
    def fails(writer):
        write(writer)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stored("kind", {}, fails)
    assert not list((own_cache / "data").iterdir())


def test_two_may_make_the_same_entry_at_once(own_cache):
    barrier, found = threading.Barrier(2, timeout=30), []

    def slow(writer):
        barrier.wait()  # both are writing now
        return write(writer)

    threads = [threading.Thread(target=lambda: found.append(rows(stored("kind", {}, slow)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ROWS, ROWS] and len(list((own_cache / "data").iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_named(own_cache):
    (own_cache / "data").mkdir(parents=True)
    (own_cache / "data").chmod(0o500)
    with pytest.raises(DataError, match="RLFT_CACHE=DIRECTORY"):
        stored("kind", {}, write)


def test_a_full_disk_is_named(monkeypatch, own_cache):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\).*RLFT_CACHE=DIRECTORY"):
        stored("kind", {}, write)
    assert not list((own_cache / "data").iterdir())


def test_a_file_is_known_by_more_than_its_time(tmp_path):
    path = tmp_path / "file"
    path.write_text("a")
    before, times = file_key(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert file_key(path) == before
    path.write_text("bb")
    os.utime(path, ns=times)
    assert file_key(path) != before


def test_a_lazy_sequence_reads_as_a_list():
    class Squares(Lazy[int]):
        def __len__(self):
            return 5

        def item(self, index):
            return index**2

    squares, plain = Squares(), [0, 1, 4, 9, 16]
    assert squares == plain and list(squares) == plain and squares != plain[:4]
    assert squares[-1] == squares[np.int64(4)] == 16 and squares[1:-1] == plain[1:-1] and squares[::-2] == plain[::-2]
    for index in (5, -6):
        with pytest.raises(IndexError):
            squares[index]
