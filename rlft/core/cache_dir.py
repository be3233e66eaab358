"""The cache directory, in which downloads and computed files are kept between runs, and writing that is atomic."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlft.core.errors import ConfigError


@runtime_checkable
class Keyed(Protocol):
    """A source with a cache key: it can identify its rows without reading them.

    A source need not have one. What is made from its texts is then made again, or cached under a hash of all texts.
    """

    @property
    def key(self) -> str | None:
        """Return a text that is equal only if the rows and their order are equal; None if there is no such text."""


def key_of(source: Any, *, made_by: Any = None) -> str | None:
    """Return the key of a source; None if it has none, or if the object `made_by` that reads it is not rlft's own."""
    is_ours = made_by is None or type(made_by).__module__.startswith("rlft.")
    return source.key if is_ours and isinstance(source, Keyed) else None


def digest(**parts: Any) -> str:
    """Return the SHA-256 (hex) of named JSON values, for the name of a file that is made from them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def key_of_texts(source: Any, split: str) -> str:
    """Return the key of a source, or the SHA-256 (hex) of all texts of the split if it has none."""
    key = key_of(source)
    if key is not None:
        return key
    rows = source.rows(split)
    found = hashlib.sha256(len(rows).to_bytes(8, "big"))
    for row in rows:
        data = row.text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "big"))  # without the lengths, ["ab", "c"] and ["a", "bc"] would be equal
        found.update(data)
    return found.hexdigest()


def cache_dir() -> Path:
    """Return the cache directory: `$RLFT_CACHE`, else `~/.cache/rlft`. Everything in it may be deleted.

    It is created if it does not exist; raises `ConfigError` if that fails.
    """
    given = os.environ.get("RLFT_CACHE")
    directory = Path(given).expanduser() if given else Path.home() / ".cache" / "rlft"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache directory {directory} cannot be made ({error.strerror}): name another by RLFT_CACHE=DIRECTORY"
        ) from error
    return directory


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`; at the end of the block it is renamed to `path` in one step.

    Two processes may write the same file at once: each has its own temporary file, and the last rename wins. If the
    block raises, the temporary file is deleted and `path` is unchanged. The temporary name has the suffix of `path`,
    because `np.save` and others look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; at the end of the block it is renamed to `path` in one step.

    If two processes make the same directory at once, the first rename wins, and the other directory is deleted. If the
    block raises, nothing is left. The files are not synced to the disk here: the caller does that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
