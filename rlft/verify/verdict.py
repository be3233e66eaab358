"""A row of the table: what a property should be, what it is, and whether that is near enough."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One verified property.

    Arguments:
        algorithm: what is verified; an algorithm's name, or a part of the package.
        claim: the property, in words.
        expected: the exact answer, or the bound.
        measured: what the package does.
        tolerance: how far the two may be apart, or by how much the bound may be passed.
        relation: "=", "<=" (measured may not be above expected) or ">=".
    """

    algorithm: str
    claim: str
    expected: float
    measured: float
    tolerance: float
    relation: str = "="

    @property
    def is_right(self) -> bool:
        if not (math.isfinite(self.measured) and math.isfinite(self.expected)):
            return False
        excess = self.measured - self.expected
        return {"=": abs(excess), "<=": excess, ">=": -excess}[self.relation] <= self.tolerance

    def as_dict(self) -> dict:
        """Return the row as JSON values, under the table's names."""
        values = asdict(self)
        return {"algorithm": self.algorithm, "property": values.pop("claim"), **values, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        return "pass" if self.is_right else "FAIL"
