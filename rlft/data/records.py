"""Records (JSON objects, rows of a table) made into rows.

The columns are TRL's. The text column is `prompt` (a string, or a conversation: a list of `{"role", "content"}`), or
`text`; all other columns are kept for the rewards. A record with `chosen` and `rejected` needs no prompt: the prompt
is then the beginning that the two share (TRL's implicit prompt).
"""

from __future__ import annotations

import glob
import importlib.util
import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError, DataError, check_choice, nearest
from rlft.data.source import SPLITS, Row, check_fractions, check_split, sha256
from rlft.data.stored_source import StoredFiles

Paths = str | list[str] | dict[str, str | list[str]]  # the inputs, or the inputs of each split
ON_BAD_ROW = ("error", "skip")
RESERVED = ("prompts", "completions", "completion_ids")  # keyword arguments of every reward
ROLES = ("system", "user", "assistant", "tool", "developer")


class RecordSource(StoredFiles):
    """Base of the sources that read records; a subclass reads one input in `records`.

    Args:
        path: a file, a list of files, or a pattern such as `shards/*.jsonl`, whose files are read in the order of their
            names. The rows are split by a hash of the text, and each split is in the order of the hashes. A mapping
            such as `{train: a, validation: b}` gives each split its own inputs, and keeps their order; a text of the
            test split is then left out of validation and train, and one of validation out of train (`leaked`).
        prompt_column: the column that holds the text.
        on_bad_row: a row that cannot be read is an error with its file and line ("error"), or left out and counted
            ("skip").
        validation, test: fractions of the rows, if `path` does not name the inputs of each split.

    Rows are duplicates if all their columns are equal; the first is kept, the others are left out and counted. Rows
    with the same prompt and different answers are all kept, in the same split. A column that a row lacks is None.
    """

    needs: str | None = None  # the package that reads the records, from the extra `data`

    def __init__(
        self,
        path: Paths,
        *,
        prompt_column: str = "prompt",
        on_bad_row: str = "error",
        validation: float = 0.05,
        test: float = 0.05,
    ) -> None:
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise ConfigError(
                f"this data set needs the package {self.needs}, which is not installed: pip install 'rlft[data]'"
            )
        check_choice("data.source.on_bad_row", on_bad_row, ON_BAD_ROW)
        check_fractions(validation, test)
        self.inputs = {split: self.expanded(names) for split, names in given_inputs(path).items()}
        self.is_split = isinstance(path, dict)
        self.prompt_column, self.on_bad_row = prompt_column, on_bad_row
        self.validation, self.test = validation, test

    @property
    def num_skipped(self) -> int:
        """The number of bad rows that were left out."""
        return self.counts["skipped"]

    def expanded(self, names: list[str]) -> list[str]:
        """Return the inputs that these names stand for; raises `ConfigError` for one that does not exist."""
        return found_files(names)

    @abstractmethod
    def records(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield (place, record) for each record of an input; the place is `name:number`.

        A `DataError` is yielded instead of a record that cannot be read.
        """

    def read(self, split: str) -> Iterator[Row | None]:
        for path in self.inputs[split]:
            for where, record in self.records(path):
                try:
                    row = make_row(record, where, self.prompt_column)
                except DataError:
                    if self.on_bad_row == "error":
                        raise
                    yield None
                else:
                    yield row

    def mark(self, row: Row) -> bytes:
        columns = {name: value for name, value in row.columns.items() if value is not None}
        return sha256(json.dumps([row.messages or row.text, columns], sort_keys=True, default=repr))

    def counted(self, num_rows: int, num_skipped: int) -> dict[str, int]:
        if not num_rows:
            inputs = [name for names in self.inputs.values() for name in names]
            listed = ", ".join(inputs[:3]) + (f" and {len(inputs) - 3} more" if len(inputs) > 3 else "")
            raise DataError(f"{listed}: no row can be used ({num_skipped} bad rows skipped)")
        return {"rows": num_rows + num_skipped, "skipped": num_skipped}


def given_inputs(path: Paths) -> dict[str, list[str]]:
    """Return the inputs of each split, all under `train` if `path` is no mapping; raises `ConfigError`."""
    given = path if isinstance(path, dict) else {"train": path}
    for name in given:
        check_split(name)
    if "train" not in given:
        raise ConfigError(f"path={path}: the train split is missing; the splits are {', '.join(SPLITS)}")
    inputs = {name: [value] if isinstance(value, str) else value for name, value in given.items()}
    for value in inputs.values():
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise ConfigError(
                f"data.source.path={path}: give a file, a list of files, a pattern such as shards/*.jsonl, or any of "
                f"them for each split, such as {{train: a.jsonl, validation: b.jsonl}}"
            )
    return inputs


def found_files(names: list[str]) -> list[str]:
    """Return the files that these names and patterns stand for; raises `ConfigError` if one stands for none."""
    found = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            found.append(str(path))
        elif glob.has_magic(name):
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
            if not files:
                raise ConfigError(f"data.source.path={name}: no file matches (looked for {path.absolute()})")
            found += files
        else:
            raise ConfigError(f"data.source.path={name}: there is no such file (looked at {path.absolute()})")
    return found


def make_row(record: Any, where: str, prompt_column: str) -> Row:
    """Return the record as a row; raises `DataError` that says what is wrong and what is allowed."""
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row is an object with named columns, got {type(record).__name__}")
    record = _with_prompt(record, prompt_column)
    if prompt_column not in record:
        names = ", ".join(map(str, record)) or "none"
        hint = nearest(prompt_column, map(str, record))
        raise DataError(
            f"{where}: there is no column {prompt_column!r}{hint}; the columns are {names}: "
            f"set data.source.prompt_column"
        )
    for name in RESERVED:
        if name in record:
            raise DataError(f"{where}: the column {name!r} has the name of an argument of every reward: rename it")
    columns = {name: value for name, value in record.items() if name != prompt_column}
    value = record[prompt_column]
    if isinstance(value, str):
        check_unicode(value, where, prompt_column)
        return Row(value, columns, where)
    messages = check_messages(value, where, prompt_column)
    return Row("\n".join(message["content"] for message in messages), columns, where, messages)


def _with_prompt(record: dict, prompt_column: str) -> dict:
    """Return a record without a prompt with the beginning that `chosen` and `rejected` share as its prompt.

    This is TRL's rule, except where the texts first differ within a word: then they are cut at the end of the word
    before it, so that a completion begins with white space. Other records are returned as they are.
    """
    chosen: Any = record.get("chosen")
    rejected: Any = record.get("rejected")
    is_chat = isinstance(chosen, list) and isinstance(rejected, list)
    is_text = isinstance(chosen, str) and isinstance(rejected, str)
    if record.get(prompt_column) is not None or not (is_chat or is_text):
        return record
    pairs = enumerate(zip(chosen, rejected, strict=False))  # one may be shorter
    size = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if is_text:
        size = _whole_words(chosen[:size])
    return record | {prompt_column: chosen[:size], "chosen": chosen[size:], "rejected": rejected[size:]}


def _whole_words(text: str) -> int:
    """Return the length of the text without its last word (which may be incomplete) and the white space before it."""
    if text[-1:].isspace():
        return len(text.rstrip())
    parts = text.rsplit(None, 1)
    return len(parts[0]) if len(parts) == 2 else 0


def check_messages(value: Any, where: str, prompt_column: str) -> tuple[dict[str, str], ...]:
    """Return a conversation's messages; raises `DataError` that says what is wrong and what is allowed."""
    allowed = f"{prompt_column!r} is a string, or a list of messages such as [{{'role': 'user', 'content': 'Hi'}}]"
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{where}: {allowed}; got {got}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{where}: {allowed}; got the message {str(message)[:80]}")
        if message["role"] not in ROLES:
            hint = nearest(message["role"], ROLES)
            raise DataError(f"{where}: role is one of {', '.join(ROLES)}, got {message['role']!r}{hint}")
        check_unicode(message["content"], where, prompt_column)
    return tuple(value)


def check_unicode(text: str, where: str, column: str) -> None:
    """Raise `DataError` for a text with a lone surrogate, which is half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column!r} holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}: "
            f"it is half of a character; mend the file"
        ) from None
