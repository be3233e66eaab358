"""The configuration that a run directory holds: read as data, and checked before anything in it is imported.

A run directory may come from anyone, and a configuration names the code that a run is made of. So config.yaml is
checked as a command line is, with one more rule: it may only name rlft's own parts, or code in a module that the caller
trusts by name. Settings that the command line gives itself are the user's own, and are not held to this rule.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_method

from rlft.config import RootConfig, checked_values, root_defaults
from rlft.core.errors import ConfigError, RunDirectoryError
from rlft.core.paths import conf_directory

CUSTOM = "rlft.rewards.custom.Custom"  # the one part that runs code which its setting names


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return config.yaml as plain values, unchecked; raises `RunDirectoryError` or `ConfigError` where it has none."""
    path = run_dir / "config.yaml"
    if not path.exists():
        raise RunDirectoryError(f"run_dir={run_dir} holds no config.yaml, and so no run")
    try:
        values = json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it holds no settings")
    return values


def from_run(
    values: Mapping[str, Any], *, run_dir: Path, trusted: Collection[str] = (), given: Mapping[str, Any] | None = None
) -> RootConfig:
    """Return the configuration of a run from what its config.yaml holds.

    Arguments:
        values: as `read_config` returns them.
        run_dir: named in errors.
        trusted: modules, packages and .py files beside rlft whose code `values` may name.
        given: root settings and groups that the command line sets; they take the place of those in `values`.

    Raises `ConfigError` naming the key, for what a command line may not say either and for code that is not trusted.
    """
    given = given or {}
    kept = {key: value for key, value in values.items() if key not in given}
    try:
        _check_plain(kept)
        for key, code, module in foreign_code(kept, trusted=trusted):
            if module == "rlft":
                raise ConfigError(
                    f"{key}={code} is no part of this version of rlft: the run was made by another one. Use that "
                    f"version, or give the settings of {key.partition('.')[0]} again"
                )
            raise ConfigError(
                f"{key}={code} is code that is not rlft's, and a run directory is not trusted: add "
                f"trusted_modules=[{module}] (rlft eval, sample and export: --trusted-modules {module}), or give the "
                f"settings of {key.partition('.')[0]} again"
            )
        return checked_values({**root_defaults(), **kept, **given, "trusted_modules": list(trusted)})
    except ConfigError as error:
        raise ConfigError(f"{run_dir / 'config.yaml'}: {error}") from error


def foreign_code(values: Any, *, trusted: Collection[str] = (), path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (key, code, its module) for each value that names code that is neither rlft's nor trusted.

    rlft's own code is what the files under conf/ name as targets, and nothing else: a dotted path can reach through a
    module into all that it imports (`rlft.models.gpt2.json.loads`), and a function of rlft's may call what it is
    handed.
    """
    if isinstance(values, dict) and "_target_" in values:
        for key, module in _foreign_keys(values, trusted):
            yield f"{path}.{key}", values.get(key), module
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in inner:
        yield from foreign_code(value, trusted=trusted, path=f"{path}.{name}" if path else str(name))


def _foreign_keys(node: dict[str, Any], trusted: Collection[str]) -> Iterator[tuple[str, str]]:
    target, function = node["_target_"], node.get("function")
    if not isinstance(target, str) or not (target in shipped_targets() or _is_defined_in(target, trusted)):
        yield "_target_", str(target).partition(".")[0]
    elif target == CUSTOM and not isinstance(
        function, str
    ):  # Hydra would build a node there and import what it returns
        yield "function", "?"
    elif target == CUSTOM:
        where = str(function).rpartition(":")[0]
        if not (_is_file_of(where, trusted) if where.endswith(".py") else _is_inside(where, trusted)):
            yield "function", where


@functools.cache
def shipped_targets() -> frozenset[str]:
    """Return the targets that the files under conf/ name: what a configuration is made of."""
    files = conf_directory().rglob("*.yaml")
    named = [re.findall(r"^\s*_target_:\s*(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files]
    return frozenset(target for targets in named for target in targets)


def _is_defined_in(target: str, trusted: Collection[str]) -> bool:
    """Whether a target lies in a trusted module and is defined in one, not only imported there."""
    if not _is_inside(target, trusted):
        return False
    try:
        return _is_inside(str(getattr(get_method(target), "__module__", None)), trusted)
    except Exception:  # hydra wraps import errors of every kind, and `checked_values` says what is wrong with this one
        return True


def _check_plain(values: Any, path: str = "") -> None:
    """Raise `ConfigError` for values that Hydra would evaluate, or pass on unchecked, when a part is made."""
    if isinstance(values, str) and "${" in values:
        raise ConfigError(f"{path}={values!r} is an interpolation, which the configuration of a run never holds")
    if isinstance(values, dict) and "_args_" in values:
        raise ConfigError(f"{path}._args_ cannot be checked: give the group again on the command line")
    for key, value in _inner(values):
        _check_plain(value, f"{path}.{key}" if path else str(key))


def _inner(values: Any) -> list[tuple[Any, Any]]:
    """Return what a dict or a list holds, with its keys or places."""
    return list(values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ())


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_file_of(path: str, trusted: Collection[str]) -> bool:
    files = [Path(one).expanduser().resolve() for one in trusted if one.endswith(".py")]
    return Path(path).expanduser().resolve() in files
