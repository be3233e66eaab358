"""Sources that cache their rows on disk: only the first start reads the files.

A row is stored as the JSON of its text, its columns and its messages, in the order of the files; each split is an array
of row numbers. Rows are never all held as Python objects: the first reading of a million rows takes the memory of their
hashes (64 bytes each), and later starts take none.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlft.data.progress_bar import reported
from rlft.data.source import (
    SPLITS,
    Row,
    SplitSource,
    given_order,
    given_splits,
    sha256,
    split_order,
    split_rows,
    text_digest,
)
from rlft.data.store import Lazy, Store, Writer, file_key, stored


class StoredSource(SplitSource):
    """Base of the cached sources. A subclass reads its inputs in `read`, and keeps its settings as plain attributes.

    Attributes in addition to the subclass's own:
        inputs: the files or other inputs of each split; all under `train` if `is_split` is false.
        is_split: whether each split has its own inputs; if not, the hash of a text chooses its split.
        validation, test: fractions of the texts, used if `is_split` is false.
    """

    inputs: dict[str, list[str]]
    is_split: bool
    test: float

    @abstractmethod
    def read(self, split: str) -> Iterator[Row | None]:
        """Yield the rows of a split's inputs, in order; None for a bad row, which is left out and counted."""

    @abstractmethod
    def input_key(self, name: str) -> Any:
        """Return what identifies the contents of an input without reading them (JSON values)."""

    def input_bytes(self, name: str) -> int:
        """Return the size of an input in bytes, for the progress bar; 0 if it is not known."""
        return 0

    def mark(self, row: Row) -> bytes:
        """Return a hash that is equal for rows that are duplicates."""
        return sha256(row.text)

    def counted(self, num_rows: int, num_skipped: int) -> dict[str, int]:
        """Return the counts of the rows that were read; a subclass may raise `DataError` if there are none."""
        return {"rows": num_rows}

    @property
    def holds_out(self) -> bool:
        return "validation" in self.inputs if self.is_split else self.validation > 0

    @cached_property
    def key(self) -> str | None:
        """As for `rlft.core.cache_dir.Keyed`, made from every attribute that does not begin with an underscore.

        None for a class outside rlft, whose code may change without a change of `VERSION`.
        """
        if not type(self).__module__.startswith("rlft."):
            return None
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        inputs = {split: [self.input_key(name) for name in names] for split, names in self.inputs.items()}
        return json.dumps([type(self).__qualname__, settings, inputs], sort_keys=True)

    def read_all(self) -> tuple[Mapping[str, Sequence[Row]], dict[str, int]]:
        if self.key is not None:
            try:
                store = stored("rows", {"source": self.key}, self._write)
            except _NotJson:
                pass  # a column cannot be stored, such as dates in Parquet: these rows are read at each start
            else:
                return {name: StoredRows(store, name) for name in SPLITS}, store.meta["counts"]
        return self._read_in_memory()

    def _write(self, writer: Writer) -> dict[str, Any]:
        """Write all rows in the order of the inputs, and the row numbers of each split."""
        rows, files, lines = writer.ragged("rows"), writer.column("files", "int32"), writer.column("lines", "int64")
        names: dict[str, None] = {}  # the columns, in the order of their first rows
        places: dict[str, int] = {}  # the number of each file
        digests, marks, split, num_skipped = bytearray(), bytearray(), bytearray(), 0
        with self._reported():
            for name in self.inputs:
                for row in self.read(name):
                    if row is None:
                        num_skipped += 1
                        continue
                    file, _, line = row.where.rpartition(":")
                    rows(_packed(row))
                    files.append(places.setdefault(file, len(places)))
                    lines.append(int(line))
                    names |= dict.fromkeys(row.columns)
                    digests += text_digest(row.text)
                    marks += self.mark(row)
                    split.append(SPLITS.index(name))
        order, counts = self._order(bytes(digests), bytes(marks), np.frombuffer(split, dtype=np.uint8))
        for name, numbers in order.items():
            writer.array(name, numbers)
        counts = self.counted(len(split), num_skipped) | counts
        return {"counts": counts, "columns": list(names), "files": list(places)}

    def _order(self, digests: bytes, marks: bytes, split: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        if self.is_split:
            return given_order(digests, marks, split)
        return split_order(digests, marks, validation=self.validation, test=self.test)

    def _read_in_memory(self) -> tuple[Mapping[str, Sequence[Row]], dict[str, int]]:
        found: dict[str, list[Row]] = {}
        num_skipped = 0
        with self._reported():
            for name in self.inputs:
                rows = list(self.read(name))
                found[name] = [row for row in rows if row is not None]
                num_skipped += len(rows) - len(found[name])
        names = dict.fromkeys(name for rows in found.values() for row in rows for name in row.columns)
        found = {
            name: [Row(r.text, {c: r.columns.get(c) for c in names}, r.where, r.messages) for r in rows]
            for name, rows in found.items()
        }
        counts = self.counted(sum(map(len, found.values())), num_skipped)
        if self.is_split:
            splits, sizes = given_splits(found, mark=self.mark)
        else:
            splits, sizes = split_rows(found["train"], validation=self.validation, test=self.test, mark=self.mark)
        return splits, counts | sizes

    @contextmanager
    def _reported(self) -> Iterator[None]:
        names = [name for names in self.inputs.values() for name in names]
        what = f"reading {Path(names[0]).name}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        with reported(what, sum(map(self.input_bytes, names)), unit="bytes") as self._advance:
            yield

    _advance: Callable[[int], None] = staticmethod(lambda _: None)  # tells the progress bar how many bytes were read


class StoredFiles(StoredSource):
    """Base of the cached sources whose inputs are files."""

    def input_key(self, name: str) -> Any:
        return file_key(Path(name))

    def input_bytes(self, name: str) -> int:
        return Path(name).stat().st_size

    def lines(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Yield (place, line) for each line of a file, without the byte order mark of the first."""
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                self._advance(len(data))
                yield f"{path}:{number}", data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data


class StoredRows(Lazy[Row]):
    """The rows of a split; each is read from the store when it is asked for."""

    def __init__(self, store: Store, split: str) -> None:
        self.store, self.order = store, store.arrays[split]
        self.names, self.files = store.meta["columns"], store.meta["files"]

    def __len__(self) -> int:
        return len(self.order)

    def item(self, index: int) -> Row:
        number = int(self.order[index])
        text, columns, messages = json.loads(self.store.row("rows", number).tobytes().decode("utf-8", "surrogatepass"))
        where = f"{self.files[self.store.arrays['files'][number]]}:{self.store.arrays['lines'][number]}"
        filled = {name: columns.get(name) for name in self.names}
        return Row(text, filled, where, None if messages is None else tuple(messages))


class _NotJson(Exception):
    """A column holds a value that JSON would change or refuse."""


def _packed(row: Row) -> bytes:
    columns = {name: value for name, value in row.columns.items() if value is not None}
    if not all(map(_is_json, [*columns.values(), *(row.messages or ())])):
        raise _NotJson
    packed = json.dumps([row.text, columns, row.messages], ensure_ascii=False, separators=(",", ":"))
    return packed.encode("utf-8", "surrogatepass")


def _is_json(value: Any) -> bool:
    """Return whether a value survives JSON unchanged; a tuple would become a list, and a date is refused."""
    kind = type(value)
    if kind is list:
        return all(map(_is_json, value))
    if kind is dict:
        return all(type(name) is str and _is_json(part) for name, part in value.items())
    return value is None or kind in (str, int, float, bool)
