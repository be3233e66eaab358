"""Breaking a part on purpose, and seeing the rows of `verify` that fail."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from rlft.verify import groups, invariance, sampled
from rlft.verify.cases import CASES
from rlft.verify.runner import guarded
from rlft.verify.verdict import Row

FIRST, SECOND, EXPECTED = "gradient of each", "at a second update", "E[gradient] over all batches"
CUT, PADDED, ORDERED = "micro-batches of", "more padding", "another order"


def case_of(name: str):
    (case,) = (case for case in CASES if case.name == name)
    return case


def gradients(name: str) -> list[Row]:
    is_small = name != "dr_grpo"  # whose constant length is the longest completion's in the small ones
    return guarded(name, lambda: groups.rows_of(case_of(name), is_small=is_small))


def unchanged(name: str) -> list[Row]:
    return guarded(name, lambda: invariance.rows_of(case_of(name)))


def drawn(name: str) -> list[Row]:
    return guarded(name, lambda: sampled.gradients(case_of(name)))


def break_(monkeypatch, module: Any, name: str, broken: Callable[..., Any]) -> None:
    """Replace a function by `broken(the right one, **arguments)`, under its signature: parts are called by names."""
    right = getattr(module, name)
    signature = inspect.signature(right)

    @functools.wraps(right)
    def call(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        return broken(right, **bound.arguments)

    monkeypatch.setattr(module, name, call)


def check(rows: list[Row], *, fails: tuple[str, ...], passes: tuple[str, ...] = ()) -> None:
    wrong = [row.claim for row in rows if not row.is_right]
    assert wrong, "the broken part was not seen"
    for text in fails:
        assert any(text in claim or claim.startswith("raised") for claim in wrong), (text, wrong)
    for text in passes:
        assert any(text in row.claim for row in rows) and not any(text in claim for claim in wrong), (text, wrong)
