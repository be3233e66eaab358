"""A disk cache of arrays: data that was read and tokenised once is memory-mapped by later starts.

An entry is a directory `<cache>/data/<kind>-<key>` with a .npy file for each array, and with meta.json, which holds
their lengths. Opening an entry takes a millisecond, and memory only for the parts that are read. Arrow, through the
library `datasets`, would do the same, but its import takes over a second, and it is only an optional extra of rlft.

The cache assumes that equal keys mean equal contents. A file enters a key by its path, size, times and inode
(`file_key`), not by its bytes: a file rewritten in place, to the same size, within one tick of the file system's clock
(4 ms on Linux) would be taken for the old one. `VERSION` stands for rlft's own code; it is raised whenever a change of
the code changes what the same files give. A truncated entry is noticed and made again; a flipped bit is not noticed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from rlft.core.cache_dir import atomic_directory, cache_dir, digest
from rlft.core.errors import DataError

VERSION = 1
FLUSH_ITEMS = 1 << 18  # items of a column that are held in memory before they are written

T = TypeVar("T")


class Lazy(Sequence[T], ABC, Generic[T]):
    """A sequence that makes an item each time it is asked for. A slice is a list, and it compares as a list."""

    @abstractmethod
    def item(self, index: int) -> T:
        """Make item `index`, 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(len(self)))]
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        return self.item(position)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Lazy, list)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # unhashable, as a list is


class Column:
    """A .npy file that is written item by item; its length is known, and written, only at the end.

    `dtype` is uint8, int32 or int64.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self.size = path, np.dtype(dtype), 0
        self._held = array({"uint8": "B", "int32": "i", "int64": "q"}[dtype])
        self._file = path.open("wb")
        self._write_header()
        self._start = self._file.tell()

    def append(self, value: int) -> None:
        self._held.append(value)
        if len(self._held) >= FLUSH_ITEMS:
            self._flush()

    def extend(self, values: Iterable[int] | bytes) -> None:
        if isinstance(values, bytes):
            self._held.frombytes(values)
        else:
            self._held.extend(values)
        if len(self._held) >= FLUSH_ITEMS:
            self._flush()

    def __len__(self) -> int:
        return self.size + len(self._held)

    def finish(self) -> None:
        """Write the remaining items and the length, wait until they are on the disk (fsync), and close the file."""
        try:
            self._flush()
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == self._start, "NumPy leaves room in a header for a first dimension that grows"
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            self._file.close()

    def _flush(self) -> None:
        self.size += len(self._held)
        try:
            self._file.write(self._held)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        del self._held[:]

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class Writer:
    """Writes an entry. Rows of different lengths are two columns: all their values, and where each row ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.columns: dict[str, Column] = {}

    def column(self, name: str, dtype: str) -> Column:
        """Return a new column."""
        self.columns[name] = Column(self.directory / f"{name}.npy", dtype)
        return self.columns[name]

    def ragged(self, name: str, dtype: str = "uint8") -> Callable[[Iterable[int] | bytes], None]:
        """Return a function that appends a row (a list of numbers, or bytes) to a new column; `Store.row` reads it."""
        values, ends = self.column(name, dtype), self.column(f"{name}_ends", "int64")

        def append(row: Iterable[int] | bytes) -> None:
            values.extend(row)
            ends.append(len(values))

        return append

    def array(self, name: str, values: np.ndarray) -> None:
        """Write a whole one-dimensional array."""
        column = self.column(name, values.dtype.name)
        column.extend(values.tobytes())

    def finish(self, meta: dict[str, Any]) -> None:
        """Close the columns and write meta.json."""
        for column in self.columns.values():
            column.finish()
        sizes = {name: column.size for name, column in self.columns.items()}
        try:
            (self.directory / "meta.json").write_text(json.dumps({"sizes": sizes, "meta": meta}))
        except OSError as error:
            raise _unwritable(self.directory, error) from error


class Store:
    """An entry: `meta` (JSON values) and memory-mapped `arrays`; raises `ValueError` or `OSError` if it is damaged."""

    def __init__(self, directory: Path) -> None:
        read = json.loads((directory / "meta.json").read_text())
        self.meta: dict[str, Any] = read["meta"]
        self.arrays: dict[str, np.ndarray] = {}
        for name, size in read["sizes"].items():
            self.arrays[name] = np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
            if self.arrays[name].shape != (size,):
                raise ValueError(f"{name}.npy has {self.arrays[name].shape} items, not {size}")

    def row(self, name: str, index: int) -> np.ndarray:
        """Return a row of a ragged column."""
        ends = self.arrays[f"{name}_ends"]
        return self.arrays[name][ends[index - 1] if index else 0 : ends[index]]

    def lengths(self, name: str) -> np.ndarray:
        """Return the length of each row of a ragged column, int64 [N]."""
        return np.diff(self.arrays[f"{name}_ends"], prepend=0)


def stored(kind: str, key: Mapping[str, Any], write: Callable[[Writer], dict[str, Any]]) -> Store:
    """Return the entry of a key; if there is none that can be read, `write` makes it, and returns its meta.

    Two processes may make the same entry at once. Raises `DataError` if it cannot be written.
    """
    path = cache_dir() / "data" / f"{kind}-{digest(version=VERSION, **key)}"
    if path.is_dir():
        try:
            return Store(path)
        except (ValueError, KeyError, OSError, EOFError) as error:
            print(f"rlft: {path} is damaged ({error}) and is made again", file=sys.stderr)
            _drop(path)
    try:
        with atomic_directory(path) as directory:
            writer = Writer(directory)
            writer.finish(write(writer))
    except OSError as error:
        if str(error.filename).startswith(str(path.parent)):
            raise _unwritable(path, error) from error
        raise  # an input could not be read
    return Store(path)


def file_key(path: Path) -> list[Any]:
    """Return what identifies a file's contents without reading them: path, inode, size and times."""
    found = path.stat()
    return [str(path), str(path.absolute()), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _drop(path: Path) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process was first
        return
    shutil.rmtree(aside, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache at {path} cannot be written ({error.strerror}): make room, or name another directory by "
        f"RLFT_CACHE=DIRECTORY"
    )
