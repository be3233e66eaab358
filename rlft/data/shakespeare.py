"""Tiny Shakespeare (Karpathy, char-rnn, 2015): 1,115,394 characters of the plays, split by position as nanoGPT does."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from bisect import bisect_left
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from rlft.core.cache_dir import atomic_path, cache_dir
from rlft.core.errors import ConfigError, DataError, nearest
from rlft.data.source import SPLITS, Row, check_fractions, check_split, given_splits

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOCUMENTS = ("whole", "speeches")
TIMEOUT_SECONDS = 30


class Shakespeare:
    """The corpus, split by position: the first part is train, then validation, then test.

    nanoGPT keeps the first 90 % for training and calls the rest validation; here its last half is the test split, so
    that training sees the same text. The split is not by hash because neighbouring speeches belong together.

    Args:
        path: the file, where it is already at hand. None: downloaded once into the cache directory.
        documents: "whole", each split is one text (for language-model training), or "speeches", each speech with its
            speaker's name is one (for prompts); a speech belongs to the split that it begins in, and one that occurs
            again, or in a later split as well, is left out and counted.
        validation, test: fractions of the characters.

    Raises:
        ConfigError: an argument is wrong. DataError, from the methods: the file is missing, is another text (by its
        SHA-256), or cannot be downloaded.
    """

    columns = ()

    def __init__(
        self, *, path: str | None = None, documents: str = "whole", validation: float = 0.05, test: float = 0.05
    ) -> None:
        if documents not in DOCUMENTS:
            allowed = ", ".join(DOCUMENTS)
            raise ConfigError(f"documents is one of {allowed}, got {documents!r}{nearest(documents, DOCUMENTS)}")
        check_fractions(validation, test)
        self.path = None if path is None else Path(path).expanduser()
        self.documents, self.validation, self.test = documents, validation, test

    def rows(self, split: str) -> list[Row]:
        """Return the texts of a split, in the order of the corpus."""
        return self._read[0][check_split(split)]

    @property
    def counts(self) -> dict[str, int]:
        """Texts in all, those left out, and the size of each split, in texts."""
        return dict(self._read[1])

    @property
    def holds_out(self) -> bool:
        """Whether a validation split was asked for."""
        return self.validation > 0

    @cached_property
    def _read(self) -> tuple[dict[str, list[Row]], dict[str, int]]:
        path = _downloaded() if self.path is None else self.path
        text = _checked(path).decode()
        bounds = [int(len(text) * (1 - self.validation - self.test)), int(len(text) * (1 - self.test))]
        newlines = [match.start() for match in re.finditer("\n", text)]
        splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
        for start, end in _cut(text, bounds, self.documents):
            line = bisect_left(newlines, start) + 1
            name = SPLITS[sum(start >= bound for bound in bounds)]
            splits[name].append(Row(text[start:end], {}, f"{path.name}:{line}"))
        rows = sum(len(split) for split in splits.values())
        clean, counts = given_splits(splits)
        return clean, {"rows": rows, **counts}


def _cut(text: str, bounds: list[int], documents: str) -> list[tuple[int, int]]:
    """Return where each document starts and ends."""
    if documents == "whole":
        edges = [0, *bounds, len(text)]
        return [(start, end) for start, end in pairwise(edges) if start < end]
    return [match.span() for match in re.finditer(r"\S.*?(?=\n\n|\s*\Z)", text, re.DOTALL)]


def _checked(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data.source.path={path}: {error.strerror}; give the path of tiny Shakespeare's text"
        ) from error
    _check_hash(data, str(path))
    return data


def _check_hash(data: bytes, name: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{name} is not tiny Shakespeare: {len(data):,} bytes with SHA-256 {found}, expected 1,115,394 bytes with "
            f"{SHA256}; for a text of your own use data/source=text_file"
        )


def _downloaded() -> Path:
    """Return the file in the cache directory, downloaded if it is not there."""
    path = cache_dir() / "tinyshakespeare.txt"
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as answer:
            data = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"tiny Shakespeare is not at {path} and cannot be downloaded from {URL} ({error}): fetch it on a machine "
            f"with network and set data.source.path=FILE, or put it there"
        ) from error
    _check_hash(data, URL)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path
