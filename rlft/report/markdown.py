"""Markdown tables: means over seeds with confidence intervals for each group of runs, and samples side by side."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t

from rlft.core.errors import ConfigError, nearest
from rlft.core.printable import printable
from rlft.report.runs import FinishedRun

REWARD, KL = "eval/reward", "eval/kl_completion"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % confidence interval (Student's t over independent seeds).

    The half-width of a single value is nan.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * error


def at_kl(run: FinishedRun, reward: str, kl: float) -> float | None:
    """Return the held-out reward when the run's KL first reaches `kl` nats per completion; None if it never does.

    Both are interpolated linearly between two evaluations.
    """
    for last, row in itertools.pairwise(row for row in run.evaluations if reward in row):
        if last.get(KL, math.nan) < kl <= row.get(KL, math.nan):
            share = (kl - last[KL]) / (row[KL] - last[KL])
            return last[reward] + share * (row[reward] - last[reward])
    return None


def results(
    groups: dict[str, list[FinishedRun]], metrics: Sequence[str], *, reward: str = REWARD, kls: Sequence[float] = ()
) -> str:
    """Return a table with two rows for each group: the metrics before training, and after it as mean ± 95 % interval.

    If the metrics before training are the same for all groups, they have one row together; runs of no steps, which
    only evaluate a policy, have none. Each of `kls` adds a column: `reward` when the KL first reaches so many nats per
    completion, over the seeds in which it does.

    Raises `ConfigError` for a metric that no run has.
    """
    known = sorted({name for runs in groups.values() for run in runs for name in run.summary["evaluation"]["after"]})
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"no run has the metric {metric}{nearest(metric, known)}; there are {', '.join(known)}")
    names = [*metrics, *(f"at {kl:g} nats" for kl in kls)]
    lines = ["| runs | seeds | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    trained = {name: runs for name, runs in groups.items() if any(run.summary.get("steps") != 0 for run in runs)}
    starts = {name: _before(runs, metrics) + " | –" * len(kls) for name, runs in trained.items()}
    are_alike = len(set(starts.values())) == 1
    if are_alike:
        lines.append(f"| before training | | {next(iter(starts.values()))} |")
    for name, runs in groups.items():
        if name in starts and not are_alike:
            lines.append(f"| {name}, before training | | {starts[name]} |")
        cells = [_cell_of([run.summary["evaluation"]["after"].get(metric) for run in runs]) for metric in metrics]
        cells += [_cell_of([at_kl(run, reward, kl) for run in runs], of=len(runs)) for kl in kls]
        lines.append(f"| {name} | {', '.join(str(run.seed) for run in runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _before(runs: list[FinishedRun], metrics: Sequence[str]) -> str:
    starts = [run.summary["evaluation"]["before"] for run in runs]
    return " | ".join(_number(statistics.fmean(start.get(metric, math.nan) for start in starts)) for metric in metrics)


def _cell_of(values: Sequence[float | None], *, of: int = 0) -> str:
    """Return mean ± half-width of the values that are not None; if fewer than `of`, with their number."""
    counted = [value for value in values if value is not None]
    mean, half = interval(counted) if counted else (math.nan, math.nan)
    some = f" ({len(counted)} of {of})" if 0 < len(counted) < of else ""
    return _number(mean) + ("" if math.isnan(half) else f" ± {_number(half)}") + some


def samples(groups: dict[str, list[FinishedRun]], count: int) -> str:
    """Return the first `count` held-out prompts with the first seed's completions before and after training."""
    parts = []
    for name, (run, *_) in groups.items():
        if not run.evaluations:  # its data has no validation split
            continue
        untouched, all_last = run.samples(0), run.samples(run.evaluations[-1]["step"])
        last = all_last[-len(untouched) :]  # an early-stopped run ends with a second evaluation
        lines = [f"#### {name}, seed {run.seed}", "", "| prompt | before | after |", "|---|---|---|"]
        for before, after in list(zip(untouched, last, strict=True))[:count]:
            lines.append(f"| {_cell(before['prompt'])} | {_scored(before)} | {_scored(after)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def provenance(groups: dict[str, list[FinishedRun]]) -> str:
    """Return a sentence with the runs' commits, versions, hardware and durations."""
    runs = [run.summary for group in groups.values() for run in group]
    commits = ", ".join(sorted({run["commit"] or "unknown" for run in runs}))
    hardware = "; ".join(sorted({run["hardware"] for run in runs}))
    versions = runs[0]["versions"]
    seconds = [run["seconds"] for run in runs]
    return (
        f"Commit {commits}; {hardware}; torch {versions['torch']}, Python {versions['python']}; "
        f"{min(seconds):.0f} to {max(seconds):.0f} s a run."
    )


def _scored(row: dict) -> str:
    reward = row.get("reward")
    return _cell(row["completion"]) + ("" if reward is None else f" ({reward:+.2f})")


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").strip()


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
