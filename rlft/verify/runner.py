"""The whole verification, part by part: which rows belong to a name, and in which order they are found."""

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
NEURAL = ("rloo", "remax", "dr_grpo", "ppo, lambda 1")  # a network costs more than a table; these read all there is


@dataclass
class Findings:
    """All rows, and where the trained algorithms came to."""

    rows: list[Row] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)


def names() -> list[str]:
    """Return what can be verified alone: parts of the package, and algorithms by their YAML's names."""
    return [*PARTS, *dict.fromkeys(case.algo for case in CASES)]


def verify(
    only: Sequence[str] = (), *, trains: bool = True, started: Callable[[str], None] = lambda name: None
) -> Findings:
    """Verify everything, or what `only` names. `started` is told each name; `trains` is whether algorithms are trained.

    What raises is a row that failed. Raises `ConfigError` for an unknown name, and outside a checkout.
    """
    for name in only:
        if name not in names():
            raise ConfigError(f"--only {name}: nothing has this name{nearest(name, names())}; {', '.join(names())}")
    algorithm_node("reinforce")
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
    """Return an algorithm's rows but for those of training."""
    found = guarded(case.name, lambda: groups.rows_of(case))
    if case.scale is not None:
        found += guarded(case.name, lambda: sampled.gradients(case))
    if case.name in NEURAL:
        found += guarded(case.name, lambda: neural.rows_of(case))
    if case.name == "dapo":
        found += guarded(case.name, lambda: refill.rows_of(case))
    return found + guarded(case.name, lambda: invariance.rows_of(case))


def guarded(name: str, part: Callable[[], list[Row]]) -> list[Row]:
    """Return a part's rows, or one that failed and says what it raised: the others are still wanted."""
    try:
        return part()
    except Exception as error:  # whatever a broken algorithm may raise
        return [Row(name, f"raised {type(error).__name__}: {error}", 0.0, math.nan, 0.0)]


def _train(course: training.Course, findings: Findings) -> list[Row]:
    made = training.trained(course)
    findings.trained.append(made)
    return made.rows()
