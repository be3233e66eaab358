"""The parts of an algorithm, checked when they are composed against what a batch has for them.

A part is a function such as those of `rlft.functional`. Its positional parameters name tensors of a batch, and its
keyword-only ones are settings, which the YAML gives or which have a default; a few settings, such as the group's size,
come from the run. A name that nothing stands for is refused, and so is a setting whose name is nearly that of a tensor
or of what the run gives: it would keep its default in silence.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rlft.core.errors import ConfigError, nearest


class Stateful(ABC):
    """A part that remembers something from batch to batch; its state goes into every checkpoint."""

    @abstractmethod
    def state_dict(self) -> dict:
        """Return the state as JSON values."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` returned."""


@dataclass(frozen=True)
class Part:
    """A part together with the names that it is called with."""

    function: Callable[..., Any]  # its settings are fixed
    names: frozenset[str]

    @property
    def module(self) -> str:
        """The name of the module that the part is from."""
        return function_of(self.function).__module__

    def __call__(self, **available: Any) -> Any:
        """Call the part with those of the available values that it names."""
        return self.function(**{name: value for name, value in available.items() if name in self.names})


def composed(part: Callable[..., Any], *, where: str, tensors: Collection[str], from_run: Collection[str] = ()) -> Part:
    """Check a part against the tensors that there are for it, and the settings that the run gives.

    Raises `ConfigError`, which begins with `where`, for a parameter that asks for anything else.
    """
    # Hydra's partial is unwrapped: it checks its target at each call, which takes a millisecond.
    args, given = (part.args, part.keywords) if isinstance(part, functools.partial) else ((), {})
    name = getattr(function_of(part), "__name__", type(part).__name__)
    parameters = inspect.signature(functools.partial(function_of(part), *args)).parameters.values()
    for p in parameters:
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in tensors and p.name not in given:
            raise ConfigError(
                f"{where}: {name} asks for the tensor '{p.name}'{nearest(p.name, tensors)}; there are "
                f"{', '.join(tensors)} (a setting stands behind a * in the signature)"
            )
    for p in parameters:
        if p.kind is p.VAR_KEYWORD:
            raise ConfigError(f"{where}: {name} takes any **{p.name}; it must name what it takes")
        if p.kind is not p.KEYWORD_ONLY or p.name in given or p.name in from_run:
            continue
        if p.default is p.empty:
            raise ConfigError(f"{where}.{p.name} is not set, and {name} has no default for it")
        if hint := nearest(p.name, [*tensors, *from_run]):  # a misspelt name would keep its default in silence
            raise ConfigError(f"{where}: {name} takes '{p.name}'{hint}; set {where}.{p.name} if it is a setting")
    names = {p.name for p in parameters if p.name in (*tensors, *from_run)} - given.keys()
    return Part(functools.partial(function_of(part), *args, **given), frozenset(names))


def function_of(part: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under a part's fixed settings."""
    return part.func if isinstance(part, functools.partial) else part
