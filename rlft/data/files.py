"""A user's own data: a text file, JSON lines, CSV, Parquet, or any data set that `datasets` can load."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError, DataError, nearest
from rlft.data.rows import StoredFiles
from rlft.data.source import Row, check_fractions
from rlft.data.table import Paths, Table, found_files, given_inputs

DOCUMENTS = ("paragraphs", "lines")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
BATCH_ROWS = 1024  # of a Parquet file, in memory at once


class TextFile(StoredFiles):
    """UTF-8 text files whose documents are lines, or paragraphs (separated by blank lines).

    Args:
        path: the files, as `Table` describes, each document split by its hash; or a mapping of splits to files.
        documents: "paragraphs" or "lines"; blank ones are no documents.
        validation, test: fractions of the documents, where the files are not split.
    """

    columns = ()

    def __init__(
        self,
        path: Paths,
        *,
        documents: str = "paragraphs",
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        if documents not in DOCUMENTS:
            allowed = ", ".join(DOCUMENTS)
            raise ConfigError(f"documents is one of {allowed}, got {documents!r}{nearest(documents, DOCUMENTS)}")
        check_fractions(validation, test)
        self.inputs = {split: found_files(names) for split, names in given_inputs(path).items()}
        self.is_split = isinstance(path, dict)
        self.documents, self.validation, self.test = documents, validation, test

    def read(self, split: str) -> Iterator[Row]:
        for name in self.inputs[split]:
            held: list[str] = []
            place = ""
            for where, data in self.lines(Path(name)):
                line = _decode(data, where)
                if line.strip():
                    place = place if held else where
                    held.append(line.rstrip("\r\n"))
                if held and (self.documents == "lines" or not line.strip()):
                    yield Row("\n".join(held), {}, place)
                    held = []
            if held:
                yield Row("\n".join(held), {}, place)


class Jsonl(Table):
    """JSON lines, UTF-8: one object a line; blank lines are no rows. Arguments as for `Table`."""

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield the object of each line."""
        for where, line in self.lines(Path(path)):
            if line.strip():
                yield where, _json(line, where)


class Csv(Table):
    """Values between separators, with a header line, UTF-8; every value is a string.

    Arguments beside `Table`'s: delimiter, what separates the values: a character, or comma, semicolon, tab or pipe.
    """

    def __init__(
        self,
        path: Paths,
        *,
        delimiter: str = "comma",
        prompt_column: str = "prompt",
        on_bad_row: str = "error",
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        super().__init__(path, prompt_column=prompt_column, on_bad_row=on_bad_row, validation=validation, test=test)
        self.delimiter = DELIMITERS.get(delimiter, "\t" if delimiter == "\\t" else delimiter)
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ConfigError(
                f"data.source.delimiter={delimiter!r} is one character (no quotation mark, no end of a line), or one "
                f"of {', '.join(DELIMITERS)}{nearest(delimiter, DELIMITERS)}"
            )

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield the values of each row by the names of the header."""
        lines = (_decode(line, where) for where, line in self.lines(Path(path)))
        csv.field_size_limit(2**31 - 1)  # of a field; by default texts above 131,072 characters are refused
        reader = csv.reader(lines, strict=True, delimiter=self.delimiter)
        header = _next(reader, path)
        if header is None:
            return
        self._check_delimiter(header, path)
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}:1: the header names {', '.join(repeated)} twice: rename one")
        first = reader.line_num + 1
        while (values := _next(reader, path)) is not None:
            where, first = f"{path}:{first}", reader.line_num + 1
            if len(values) == len(header):
                yield where, dict(zip(header, values, strict=True))
            elif values:
                yield where, DataError(f"{where}: {len(values)} values for the {len(header)} columns of the header")

    def _check_delimiter(self, header: list[str], path: str) -> None:
        """Raise `DataError` for a header that another separator seems to cut, and this one does not."""
        if self.prompt_column in header:
            return
        for name, delimiter in DELIMITERS.items():
            columns = next(csv.reader([self.delimiter.join(header)], delimiter=delimiter), [])
            if self.prompt_column in columns or (len(header) == 1 < len(columns)):
                raise DataError(
                    f"{path}:1: the file seems to be separated by {name}s ({', '.join(columns)}), and is read by "
                    f"{self.delimiter!r}: set data.source.delimiter={name}"
                )


class Parquet(Table):
    """Parquet; a row's place is its number, from 1. Arguments as for `Table`. Needs the extra `data`."""

    def __init__(
        self,
        path: Paths,
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
        number = 0
        try:
            file = self._parquet.ParquetFile(path)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                self._advance(self.input_bytes(path) * batch.num_rows // file.metadata.num_rows)
                for number, record in enumerate(batch.to_pylist(), number + 1):  # noqa: B020  it goes on counting
                    yield f"{path}:{number}", record
        except (self._pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error


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
        split: Paths = "train",
        prompt_column: str = "prompt",
        on_bad_row: str = "error",
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        super().__init__(split, prompt_column=prompt_column, on_bad_row=on_bad_row, validation=validation, test=test)
        self.path, self.name = path, name
        self._datasets = _extra("datasets")
        self._loaded: dict[str, Any] = {}

    def expanded(self, names: list[str]) -> list[str]:
        """Accept any name of a split: the data set knows which there are."""
        return names

    def input_key(self, name: str) -> Any:
        """Return the fingerprint by which `datasets` itself knows the split: of its files and what was done to them."""
        return self._load(name)._fingerprint

    def input_bytes(self, name: str) -> int:
        return self._load(name).size_in_bytes or 0

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield each row of one split of the data set."""
        rows = self._load(path)
        for number, record in enumerate(rows, 1):
            self._advance(self.input_bytes(path) // len(rows))
            yield f"{self.path}[{path}]:{number}", record

    def _load(self, split: str) -> Any:
        if split not in self._loaded:
            self._loaded[split] = self._loaded_from_disk(split)
        return self._loaded[split]

    def _loaded_from_disk(self, split: str) -> Any:
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
                f"{type(error).__name__}: {error}; without network give a local directory, or a file with "
                f"data/source=jsonl, csv or parquet"
            ) from error


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this data set needs the package {module.partition('.')[0]}, which is not installed: "
            f"pip install 'rlft[data]'"
        ) from error


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


def _next(reader: Any, file: str) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV: {error} (a quotation mark that is not closed?)") from error
