"""The whole verification: the rows of each name, in the order of the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlft.build import algorithm_node
from rlft.core.errors import ConfigError, nearest
from rlft.verify import divergence, groups, invariance, neural, optimum, refill, sampled, training
from rlft.verify.cases import CASES, Case
from rlft.verify.training import Trained
from rlft.verify.verdict import Row

PARTS: dict[str, Callable[[], list[Row]]] = {
    "optimum": optimum.rows,
    "kl": divergence.rows,
    "sampler": sampled.engine,
    "trainer": invariance.trainer_rows,
}
NEURAL = ("rloo", "remax", "dr_grpo", "ppo, lambda 1")  # a few only: networks are slow


@dataclass
class Findings:
    """All rows, and the trained policies."""

    rows: list[Row] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)


def names() -> list[str]:
    """Return the names that can be verified alone: parts of the package, and algorithms by their YAML's names."""
    return [*PARTS, *dict.fromkeys(case.algo for case in CASES)]


def verify(
    only: Sequence[str] = (), *, trains: bool = True, started: Callable[[str], None] = lambda name: None
) -> Findings:
    """Verify everything, or only the given names.

    `started` is called with each name as its turn comes; without `trains` no algorithm is trained. An exception in a
    part becomes a row that fails. Raises `ConfigError` for an unknown name, or if rlft's YAML files are missing.
    """
    for name in only:
        if name not in names():
            raise ConfigError(f"--only {name}: nothing has this name{nearest(name, names())}; {', '.join(names())}")
    algorithm_node("reinforce")  # raises if there are no YAML files
    findings = Findings()
    for name in only or names():
        started(name)
        if name in PARTS:
            findings.rows += guarded(name, PARTS[name])
        for case in CASES:
            if case.algo == name:
                findings.rows += of_case(case)
        for course in training.courses() if trains else ():
            if course.case.algo == name:
                findings.rows += guarded(name, functools.partial(_train, course, findings))
    return findings


def of_case(case: Case) -> list[Row]:
    """Return an algorithm's rows, except those of training."""
    found = guarded(case.name, lambda: groups.rows_of(case))
    if case.scale is not None:
        found += guarded(case.name, lambda: sampled.gradients(case))
    if case.name in NEURAL:
        found += guarded(case.name, lambda: neural.rows_of(case))
    if case.name == "dapo":
        found += guarded(case.name, lambda: refill.rows_of(case))
    return found + guarded(case.name, lambda: invariance.rows_of(case))


def guarded(name: str, part: Callable[[], list[Row]]) -> list[Row]:
    """Return a part's rows, or one failed row with its exception, so that the other parts still run."""
    try:
        return part()
    except Exception as error:  # whatever a broken algorithm may raise
        return [Row(name, f"raised {type(error).__name__}: {error}", 0.0, math.nan, 0.0)]


def _train(course: training.Course, findings: Findings) -> list[Row]:
    made = training.trained(course)
    findings.trained.append(made)
    return made.rows()
