"""Where computed and downloaded files are kept between runs, and how a file gets there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlft.core.errors import ConfigError


@runtime_checkable
class Keyed(Protocol):
    """A source that can say what it would read without reading it; what is made of its texts is then kept by that.

    A source need not be one: what is made of its texts is then made anew, or kept by a hash of them all.
    """

    @property
    def key(self) -> str | None:
        """Return a text that is equal where the rows are, in the same order; None where that cannot be told."""


def key_of(source: Any, *, made_by: Any = None) -> str | None:
    """Return the key of a source; None where it has none, or where `made_by`, which reads it, is not of rlft's code."""
    is_ours = made_by is None or type(made_by).__module__.startswith("rlft.")
    return source.key if is_ours and isinstance(source, Keyed) else None


def digest(**parts: Any) -> str:
    """Return SHA-256 (hex) of named JSON values, for the name of what was made from them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def texts_digest(texts: Iterable[str], count: int) -> str:
    """Return SHA-256 (hex) of `count` texts; their lengths keep two lists of texts from sharing one."""
    found = hashlib.sha256(count.to_bytes(8, "big"))
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "big"))
        found.update(data)
    return found.hexdigest()


def cache_dir() -> Path:
    """Return the cache directory, created if absent: `$RLFT_CACHE`, else `~/.cache/rlft`. All in it may be deleted.

    Raises `ConfigError` where it cannot be made.
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
    """Yield a temporary path beside `path`; on leaving the block, what was written there becomes `path` in one step.

    Two processes may write the same file at once: each has its own temporary file, and the last rename wins. If the
    block raises, nothing is left and `path` is as it was. The temporary name ends as `path` does, because `np.save`
    and others choose by the suffix.
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
    """Yield a temporary directory beside `path`; on leaving the block, it becomes `path` in one step.

    Of two processes that make the same directory at once the first rename wins, and the other's work is dropped. If
    the block raises, nothing is left. Who writes the files sees to it that they are on the disk (fsync).
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
