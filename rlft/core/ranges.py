"""Ranges and choices of settings, as annotations such as `rows_per_step: Size`; rlft/config.py checks them.

The annotations do not check the arguments of a constructor that is called from Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from rlft.core.errors import nearest


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; `low` is excluded if `is_open`."""

    low: float
    high: float = math.inf
    is_open: bool = False

    def refusal(self, value: float) -> str | None:
        """Return None for a value in the range; otherwise the bound that it violates, such as "at least 1"."""
        if not (value > self.low if self.is_open else value >= self.low):  # nan is outside too
            return f"above {self.low}" if self.is_open else f"at least {self.low}"
        return None if value <= self.high else f"at most {self.high}"


@dataclass(frozen=True)
class Choice:
    """One of a few names."""

    names: tuple[str, ...]

    def refusal(self, value: str) -> str | None:
        """Return None for one of the names; otherwise "one of …" with the nearest name."""
        return None if value in self.names else f"one of {', '.join(self.names)}{nearest(value, self.names)}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Size = Annotated[int, Range(1, 2**31 - 1)]  # of a batch or a model: the length of a tensor
SizeOrZero = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(0, is_open=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]  # shares, and decay factors such as gamma
