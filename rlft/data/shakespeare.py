"""Tiny Shakespeare (Karpathy, char-rnn, 2015): 1,115,394 characters of the plays, split by position as nanoGPT does."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path

from rlft.core.cache_dir import atomic_path, cache_dir
from rlft.core.errors import DataError, check_choice
from rlft.data.source import SPLITS, Row, SplitSource, check_fractions, given_splits

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOCUMENTS = ("whole", "speeches")
TIMEOUT_SECONDS = 30


class Shakespeare(SplitSource):
    """The corpus, split by position: the first part is train, then validation, then test.

    nanoGPT trains on the first 90 % and validates on the rest. Here the training split is the same, and the second half
    of the rest is the test split. The split is not by hash, because neighbouring speeches belong together.

    Args:
        path: the file. None: it is downloaded once into the cache directory.
        documents: "whole" makes each split one text (for language-model training); "speeches" makes each speech a text,
            with its speaker's name (for prompts). A speech belongs to the split that it begins in. A speech that occurs
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
        check_choice("data.source.documents", documents, DOCUMENTS)
        check_fractions(validation, test)
        self.path = None if path is None else Path(path).expanduser()
        self.documents, self.validation, self.test = documents, validation, test

    def read_all(self) -> tuple[dict[str, list[Row]], dict[str, int]]:
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
    """Return the start and the end of each document, in characters."""
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
    """Return the path of the file in the cache directory; it is downloaded if it is not there."""
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
