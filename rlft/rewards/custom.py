"""A user's own reward function, given by its module or file and its name."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlft.core.errors import ConfigError, RewardError, nearest
from rlft.rewards.compose import OWN_KEYWORDS

FORMS = "package.module:function or /path/to/file.py:function"


class Custom:
    """Calls a function that has TRL's signature, such as `def reward(completions, **kwargs) -> list[float | None]`.

    It is called with the keywords `prompts`, `completions`, `completion_ids` and every other column of the data, but
    without TRL's `trainer_state`, `log_extra` and `log_metric`. An `async def` is awaited. `RewardSum` turns its
    exceptions into a `RewardError` with the reward's name.
    """

    def __init__(self, function: str, *, messages: bool = False) -> None:
        """Arguments:

        function: "package.module:function" for a module that Python can import, or "file.py:function" for a file
            (relative to the directory in which the run was started). The module is executed, so it must be trusted.
        messages: whether prompts and completions are lists of messages, as TRL passes them for conversations. A
            completion is then `[{"role": "assistant", "content": text}]`, and a prompt that was no conversation is one
            message of the user. If false, both are strings, and a conversation is as the chat template renders it.

        Raises `ConfigError` if it cannot be imported, is not a function, or does not accept the keywords.
        """
        if not isinstance(function, str):
            raise _refused(function, f"must be {FORMS}")
        where, _, name = function.rpartition(":")
        if not where or not name:
            raise _refused(function, f"must be {FORMS}")
        module = (
            _from_file(function, Path(where).expanduser()) if where.endswith(".py") else _from_module(function, where)
        )
        self.function, self.messages = _function_in(module, name, function), messages
        self.needs = _columns_of(self.function)

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        prompt_messages: list[Sequence[dict[str, str]] | None] | None = None,
        **columns: Any,
    ) -> Any:
        """Raises `ConfigError` if the data lacks a column that the function requires."""
        for column in self.needs:
            if column not in columns:
                raise ConfigError(
                    f"the function needs a column {column!r}{nearest(column, columns)}; beside the prompt the data has "
                    f"{', '.join(columns) or 'none'}"
                )
        given: dict[str, Any] = {"prompts": prompts, "completions": completions}
        if self.messages:
            pairs = zip(prompts, prompt_messages or [None] * len(prompts), strict=True)
            chats = [({"role": "user", "content": text},) if own is None else own for text, own in pairs]
            given = {
                "prompts": [[dict(message) for message in chat] for chat in chats],  # copies
                "completions": [[{"role": "assistant", "content": text}] for text in completions],
            }
        try:
            returned = self.function(**given, completion_ids=completion_ids, **columns)
            return asyncio.run(returned) if inspect.iscoroutine(returned) else returned
        except TypeError as error:
            if self.messages or "string indices" not in str(error):
                raise
            raise RewardError(
                f"it indexes a string as if it were a message ({error}): prompts and completions are handed over as "
                f"strings; reward.custom.messages=true makes them lists of messages, as TRL's functions for "
                f"conversations read them"
            ) from error


def _columns_of(function: Callable[..., Any]) -> list[str]:
    """Return the parameters that have no default and must be columns of the data."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in OWN_KEYWORDS
        and parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]


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
    assert spec is not None and spec.loader is not None  # true for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look modules up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise _refused(function, f"could not be run: {type(error).__name__}: {error}") from error
    return module


def _function_in(module: ModuleType, name: str, function: str) -> Callable[..., Any]:
    try:
        found = getattr(module, name)  # not vars(module), which lacks the attributes of a lazy module
    except AttributeError as error:
        own = vars(module)  # only `dir` lists the names of a lazy module, and their values are not looked at
        names = [key for key in dir(module) if not key.startswith("_") and (key not in own or callable(own[key]))]
        raise _refused(
            function, f"names no function: {module.__name__} has {', '.join(names) or 'none'}{nearest(name, names)}"
        ) from error
    except Exception as error:  # a lazy module imports at this point, which may raise anything
        raise _refused(function, f"could not be imported: {type(error).__name__}: {error}") from error
    if inspect.isclass(found) or not callable(found):
        kind = "a class" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise _refused(
            function,
            f"is {kind}, not a function; for a reward class write a file conf/reward/<name>.yaml with its _target_",
        )
    try:
        signature = inspect.signature(found)
        for one in signature.parameters.values():
            if one.kind is one.POSITIONAL_ONLY and one.default is one.empty:
                raise TypeError(f"{one.name!r} cannot be passed as a keyword")
        signature.bind_partial(**dict.fromkeys(OWN_KEYWORDS))
    except TypeError as error:
        raise _refused(
            function,
            f"cannot be called as a reward ({error}): it gets the keywords {', '.join(OWN_KEYWORDS)} and every other "
            f"column of the data; a **kwargs takes those that it does not use. Where it makes a reward from settings, "
            f"call it in a file of your own, as in score = {name}(…), and name that: FILE.py:score",
        ) from error
    return found


def _refused(function: Any, why: str) -> ConfigError:
    return ConfigError(f"reward.custom.function={function!r} {why}")
