"""A user's own data: a text file, JSON lines, CSV, Parquet, or any data set that `datasets` can load."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rlft.data.source import Row, check_fractions, check_split, given_splits, split_rows
from rlft.data.table import Table, check_file, check_inputs
from rlft.errors import ConfigError, DataError, nearest

DOCUMENTS = ("paragraphs", "lines")


class TextFile:
    """A UTF-8 text file whose documents are lines, or paragraphs (separated by blank lines).

    Args:
        path: the file, split by a hash of each document; or a mapping of splits to files, as `Table` describes.
        documents: "paragraphs" or "lines"; blank ones are no documents.
        validation, test: fractions of the documents, where one file is given.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        *,
        documents: str = "paragraphs",
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        if documents not in DOCUMENTS:
            allowed = ", ".join(DOCUMENTS)
            raise ConfigError(f"documents is one of {allowed}, got {documents!r}{nearest(documents, DOCUMENTS)}")
        check_fractions(validation, test)
        self.inputs = {name: check_file(value) for name, value in check_inputs(path).items()}
        self.is_split = isinstance(path, dict)
        self.documents, self.validation, self.test = documents, validation, test

    def rows(self, split: str) -> list[Row]:
        """Return the documents of a split."""
        return self._read[0][check_split(split)]

    @property
    def counts(self) -> dict[str, int]:
        """Documents read, duplicates left out, and the size of each split."""
        return dict(self._read[1])

    @cached_property
    def _read(self) -> tuple[dict[str, list[Row]], dict[str, int]]:
        splits = {name: list(_documents(path, self.documents)) for name, path in self.inputs.items()}
        num_rows = sum(map(len, splits.values()))
        if self.is_split:
            clean, counts = given_splits(splits)
        else:
            clean, counts = split_rows(splits["train"], validation=self.validation, test=self.test)
        return clean, {"rows": num_rows, **counts}


class Jsonl(Table):
    """JSON lines, UTF-8: one object a line; blank lines are no rows. Arguments as for `Table`."""

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield the object of each line."""
        for where, line in _lines(check_file(path)):
            if line.strip():
                yield where, _json(line, where)


class Csv(Table):
    """CSV with a header line, UTF-8; every value is a string. Arguments as for `Table`."""

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield the values of each row by the names of the header."""
        file = check_file(path)
        reader = csv.reader((_decode(line, where) for where, line in _lines(file)), strict=True)
        header = _next(reader, file)
        if header is None:
            return
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{file}:1: the header names {', '.join(repeated)} twice: rename one")
        first = reader.line_num + 1
        while (values := _next(reader, file)) is not None:
            where, first = f"{file}:{first}", reader.line_num + 1
            if len(values) == len(header):
                yield where, dict(zip(header, values, strict=True))
            elif values:
                yield where, DataError(f"{where}: {len(values)} values for the {len(header)} columns of the header")


class Parquet(Table):
    """Parquet; a row's place is its number, from 1. Arguments as for `Table`. Needs the extra `data`."""

    def __init__(
        self,
        path: str | dict[str, str],
        *,
        prompt_column: str = "prompt",
        on_bad_row: str = "error",
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        super().__init__(path, prompt_column=prompt_column, on_bad_row=on_bad_row, validation=validation, test=test)
        self._pyarrow, self._parquet = _extra("pyarrow"), _extra("pyarrow.parquet")

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield each row of the file."""
        file = check_file(path)
        try:
            table = self._parquet.read_table(file)
        except (self._pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a Parquet file that can be read: {error}") from error
        for number, record in enumerate(table.to_pylist(), 1):
            yield f"{file}:{number}", record


class HuggingFaceData(Table):
    """A data set of the Hugging Face hub, or a local directory of one. Needs the extra `data`.

    Args:
        path: a hub name, a directory of data files, or one written by `save_to_disk`.
        name: the configuration, where the data set has several.
        split: the data set's split to read, which is split further by a hash of the text; or a mapping such as
            `{train: train, validation: test}` of our splits to the data set's own.
        prompt_column, on_bad_row, validation, test: as for `Table`.

    A row's place is its number in the data set's split, from 1.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str | dict[str, str] = "train",
        prompt_column: str = "prompt",
        on_bad_row: str = "error",
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        super().__init__(split, prompt_column=prompt_column, on_bad_row=on_bad_row, validation=validation, test=test)
        self.path, self.name = path, name
        self._datasets = _extra("datasets")

    def check_input(self, path: str) -> None:
        """Accept any name of a split: the data set knows which there are."""

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield each row of one split of the data set."""
        for number, record in enumerate(self._load(path), 1):
            yield f"{self.path}[{path}]:{number}", record

    def _load(self, split: str) -> Any:
        directory = Path(self.path).expanduser()
        try:
            if (directory / "dataset_dict.json").is_file():
                return self._datasets.load_from_disk(str(directory))[split]
            if (directory / "state.json").is_file():
                return self._datasets.load_from_disk(str(directory))
            name = str(directory) if directory.is_dir() else self.path
            return self._datasets.load_dataset(name, self.name, split=split)
        except (OSError, ValueError, KeyError, self._datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"data.source.path={self.path} (name={self.name}, split={split}) cannot be loaded: "
                f"{type(error).__name__}: {error}; without network give a local directory, or a file with data=jsonl, "
                f"data=csv or data=parquet"
            ) from error


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this data set needs the package {module.partition('.')[0]}, which is not installed: "
            f"pip install 'rlft[data]'"
        ) from error


def _documents(path: Path, documents: str) -> Iterator[Row]:
    held: list[str] = []
    place = ""
    for where, data in _lines(path):
        line = _decode(data, where)
        if line.strip():
            place = place if held else where
            held.append(line.rstrip("\r\n"))
        if held and (documents == "lines" or not line.strip()):
            yield Row("\n".join(held), {}, place)
            held = []
    if held:
        yield Row("\n".join(held), {}, place)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each line of a file with its place; the byte order mark of the first is dropped."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            yield f"{path}:{number}", data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None


def _json(data: bytes, where: str) -> Any:
    """Return the object, or a `DataError` in its place."""
    try:
        return json.loads(_decode(data, where))
    except DataError as error:
        return error
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not JSON: {error}")


def _next(reader: Any, file: Path) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV: {error} (a quotation mark that is not closed?)") from error
