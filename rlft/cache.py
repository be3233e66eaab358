"""Where computed and downloaded files are kept between runs, and how a file gets there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache directory, created if absent: `$RLFT_CACHE`, else `~/.cache/rlft`. All in it may be deleted."""
    given = os.environ.get("RLFT_CACHE")
    directory = Path(given).expanduser() if given else Path.home() / ".cache" / "rlft"
    directory.mkdir(parents=True, exist_ok=True)
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
