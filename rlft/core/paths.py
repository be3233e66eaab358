"""Paths: the file or hub name that a `path` setting stands for, and the directory of the YAML files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rlft.core.errors import ConfigError

PACKAGE = "package:"


def resolve(path: str) -> Path | str:
    """Return an existing local `Path`, or `path` itself if it can only be a name on the Hugging Face hub.

    `package:rlft/assets/tiny` is `assets/tiny` inside the installed package `rlft`. Any other path is local if it
    exists on disk. It must exist if it is written like a local path (`/…`, `./…`, `../…`, `~…`, or with two slashes).

    Raises `ConfigError` if the package, the file or the directory does not exist.
    """
    if path.startswith(PACKAGE):
        return _inside_package(path)
    local = Path(path).expanduser()
    if path and local.exists():
        return local
    if not path or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ConfigError(
            f"path={path!r}: there is no such file or directory (looked at {local.absolute()}); "
            f"give an existing directory, 'package:<package>/<directory>', or a hub name such as 'gpt2'"
        )
    return path


def conf_directory() -> Path:
    """Return the directory of the YAML files: rlft/conf in an installed package, conf/ beside rlft/ in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def _inside_package(path: str) -> Path:
    """Return a path inside a package, without importing it: a path in a run's configuration must not run code."""
    package, _, inner = path.removeprefix(PACKAGE).partition("/")
    top, *below = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # an empty name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"path={path!r}: the package {package!r} is not installed; write 'package:<package>/<directory>'"
        )
    found = Path(next(iter(spec.submodule_search_locations))).joinpath(*below, inner)
    if not found.exists():
        raise ConfigError(f"path={path!r}: the package {package!r} holds no {inner!r} (looked at {found})")
    return found
