"""What a setting may be, said where it is declared: `rows_per_step: Size`; rlft/config.py refuses the rest.

An annotation alone changes nothing for whoever calls the constructor in Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from rlft.core.errors import nearest


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both allowed, or from above `low` where `is_open`."""

    low: float
    high: float = math.inf
    is_open: bool = False

    def refusal(self, value: float) -> str | None:
        """Return what `value` must be, such as "at least 1", where it lies outside; None where it does not."""
        if not (value > self.low if self.is_open else value >= self.low):  # so is nan outside
            return f"above {self.low}" if self.is_open else f"at least {self.low}"
        return None if value <= self.high else f"at most {self.high}"


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def refusal(self, value: str) -> str | None:
        """Return what `value` must be where it is none of the names; None where it is one."""
        return None if value in self.names else f"one of {', '.join(self.names)}{nearest(value, self.names)}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Size = Annotated[int, Range(1, 2**31 - 1)]  # of a batch or a model: what tensors are as long as
SizeOrZero = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(0, is_open=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]  # of a whole, and what decays by the step, such as gamma
