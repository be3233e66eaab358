"""How an algorithm calls its parts: with those of the available values that their signature names."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class Stateful(ABC):
    """A part that remembers something from batch to batch; its state goes into every checkpoint."""

    @abstractmethod
    def state_dict(self) -> dict:
        """Return the state as JSON values."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` returned."""


def parameters(part: Callable[..., Any]) -> frozenset[str]:
    """Return the names of what the part takes."""
    function = function_of(part)
    is_plain = inspect.isfunction(function) and not getattr(part, "args", ())
    return _names_of(function) if is_plain else frozenset(inspect.signature(part).parameters)


def call(part: Callable[..., Any], **available: Any) -> Any:
    """Call a part with those of the available values that its signature names.

    Its settings are taken out of a partial: Hydra's own looks up what it may call at each call, which takes a
    millisecond.
    """
    args, settings = (part.args, part.keywords) if isinstance(part, functools.partial) else ((), {})
    names = parameters(part)
    return function_of(part)(*args, **settings | {name: value for name, value in available.items() if name in names})


def function_of(part: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under a part's fixed settings."""
    return part.func if isinstance(part, functools.partial) else part


@functools.cache
def _names_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
