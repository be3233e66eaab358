"""A row of the table: a property's exact answer, what was measured, and whether the two agree."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

SAME = 1e-10  # tolerance of a relative difference in float64


@dataclass(frozen=True)
class Row:
    """One verified property.

    Arguments:
        algorithm: the algorithm's name, or the part of the package, that is verified.
        claim: the property, in words.
        expected: the exact answer, or the bound.
        measured: what the package computes.
        tolerance: the largest difference that is allowed, or by how much the bound may be passed.
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


def same(algorithm: str, claim: str, measured: Any, wanted: Any) -> Row:
    """Return the row that two arrays or tensors are equal: their largest difference over the largest entry is 0."""
    return Row(algorithm, claim, 0.0, float(abs(measured - wanted).max() / abs(wanted).max()), SAME)
