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


def parameters(part: Callable[..., Any]) -> set[str]:
    """Return the names of what the part takes."""
    return set(inspect.signature(part).parameters)


def call(part: Callable[..., Any], **available: Any) -> Any:
    """Call a part with those of the available values that its signature names."""
    return part(**{name: value for name, value in available.items() if name in parameters(part)})


def function_of(part: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under a part's fixed settings."""
    return part.func if isinstance(part, functools.partial) else part
