"""A reward function of one's own, named by where it stands."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlft.errors import ConfigError, nearest
from rlft.rewards.compose import OWN_KEYWORDS

FORMS = "package.module:function or /path/to/file.py:function"


class Custom:
    """Calls a function that has TRL's signature, such as `def reward(completions, **kwargs) -> list[float | None]`.

    It gets the keywords `prompts`, `completions` (strings), `completion_ids` and every other column of the data; an
    `async def` is awaited. TRL's `trainer_state`, `log_extra` and `log_metric` are not given. `RewardSum` turns its
    exceptions into `RewardError`s with the reward's name.
    """

    def __init__(self, function: str) -> None:
        """Arguments:

        function: "package.module:function" of a module that Python can import, or "file.py:function" of a file
            (relative to the directory that the run was started in). The module is run, so name only what you trust.

        Raises `ConfigError` if it cannot be imported, is not a function, or does not take the keywords.
        """
        if not isinstance(function, str):
            raise _refused(function, f"must be {FORMS}")
        where, _, name = function.rpartition(":")
        if not where or not name:
            raise _refused(function, f"must be {FORMS}")
        module = (
            _from_file(function, Path(where).expanduser()) if where.endswith(".py") else _from_module(function, where)
        )
        self.function = _function_in(module, name, function)

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> Any:
        returned = self.function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return asyncio.run(returned) if inspect.iscoroutine(returned) else returned


def _from_module(function: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _refused(
            function,
            f"could not be imported: {type(error).__name__}: {error}. Give {FORMS}; a module must be installed or lie "
            f"in a directory on PYTHONPATH",
        ) from error


def _from_file(function: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise _refused(function, f"names no file: there is no {path.absolute()}")
    spec = importlib.util.spec_from_file_location(f"rlft_custom_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # true of every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise _refused(function, f"could not be run: {type(error).__name__}: {error}") from error
    return module


def _function_in(module: ModuleType, name: str, function: str) -> Callable[..., Any]:
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in vars(module):
        raise _refused(
            function, f"names no function: {module.__name__} has {', '.join(names) or 'none'}{nearest(name, names)}"
        )
    found = vars(module)[name]
    if inspect.isclass(found) or not callable(found):
        kind = "a class" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise _refused(
            function,
            f"is {kind}, not a function; for a reward class write a file conf/reward/<name>.yaml with its _target_",
        )
    try:
        inspect.signature(found).bind_partial(**dict.fromkeys(OWN_KEYWORDS))
    except TypeError as error:
        raise _refused(
            function,
            f"cannot be called as a reward ({error}): it gets the keywords {', '.join(OWN_KEYWORDS)} and every other "
            f"column of the data; a **kwargs takes those that it does not use",
        ) from error
    return found


def _refused(function: Any, why: str) -> ConfigError:
    return ConfigError(f"reward.custom.function={function!r} {why}")
