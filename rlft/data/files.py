"""Sources for a user's own data: text files, JSON lines, CSV, Parquet, or any data set that `datasets` can load."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError, DataError, check_choice, nearest
from rlft.data.records import Paths, RecordSource, found_files, given_inputs
from rlft.data.source import Row, check_fractions
from rlft.data.stored_source import StoredFiles

DOCUMENTS = ("paragraphs", "lines")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
BATCH_ROWS = 1024  # rows of a Parquet file in memory at once


class TextFile(StoredFiles):
    """UTF-8 text files; each line, or each paragraph (separated by blank lines), is one text.

    Args:
        path: the files, as for `RecordSource`.
        documents: "paragraphs" or "lines"; blank ones are left out.
        validation, test: fractions of the texts, if `path` does not name the files of each split.
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
        check_choice("data.source.documents", documents, DOCUMENTS)
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


class Jsonl(RecordSource):
    """JSON lines, UTF-8: one object a line; blank lines are skipped. Arguments as for `RecordSource`."""

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield the object of each line."""
        for where, line in self.lines(Path(path)):
            if line.strip():
                yield where, _json(line, where)


class Csv(RecordSource):
    """Values between delimiters, with a header line, UTF-8; every value is a string.

    Arguments in addition to `RecordSource`'s: delimiter, a character, or one of the words comma, semicolon, tab, pipe.
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
        csv.field_size_limit(2**31 - 1)  # by default, fields of more than 131,072 characters are refused
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
        """Raise `DataError` if the header seems to be written with another delimiter."""
        if self.prompt_column in header:
            return
        for name, delimiter in DELIMITERS.items():
            columns = next(csv.reader([self.delimiter.join(header)], delimiter=delimiter), [])
            if self.prompt_column in columns or (len(header) == 1 < len(columns)):
                raise DataError(
                    f"{path}:1: the file seems to be separated by {name}s ({', '.join(columns)}), and is read by "
                    f"{self.delimiter!r}: set data.source.delimiter={name}"
                )


class Parquet(RecordSource):
    """Parquet files. A row's place is its number, from 1. Arguments as for `RecordSource`. Needs the extra `data`."""

    needs = "pyarrow"

    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield each row of the file."""
        from pyarrow import ArrowException, parquet

        number = 0
        try:
            file = parquet.ParquetFile(path)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                self._advance(self.input_bytes(path) * batch.num_rows // file.metadata.num_rows)
                for number, record in enumerate(batch.to_pylist(), number + 1):  # noqa: B020  counts across batches
                    yield f"{path}:{number}", record
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error


class HuggingFaceData(RecordSource):
    """A data set of the Hugging Face hub, or a local directory of one. Needs the extra `data`.

    Args:
        path: a hub name, a directory of data files, or one written by `save_to_disk`.
        name: the configuration, where the data set has several.
        split: the split of the data set that is read, and then split by a hash of the text; or a mapping from our
            splits to the data set's own, such as `{train: train, validation: test}`.
        prompt_column, on_bad_row, validation, test: as for `RecordSource`.

    A row's place is its number in the data set's split, from 1.
    """

    needs = "datasets"

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
        self._loaded: dict[str, Any] = {}

    def expanded(self, names: list[str]) -> list[str]:
        """Return the names of splits as they are; the data set itself refuses an unknown one when it is loaded."""
        return names

    def input_key(self, name: str) -> Any:
        """Return the fingerprint that `datasets` computes from the split's files and from what was done to them."""
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
        import datasets

        directory = Path(self.path).expanduser()
        try:
            if (directory / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(directory))[split]
            if (directory / "state.json").is_file():
                return datasets.load_from_disk(str(directory))
            name = str(directory) if directory.is_dir() else self.path
            return datasets.load_dataset(name, self.name, split=split)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"data.source.path={self.path} (name={self.name}, split={split}) cannot be loaded: "
                f"{type(error).__name__}: {error}; without network give a local directory, or a file with "
                f"data/source=jsonl, csv or parquet"
            ) from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None


def _json(data: bytes, where: str) -> Any:
    """Return the object, or a `DataError` (not raised) if it cannot be read."""
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
