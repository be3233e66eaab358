"""Markdown: one row for each group of runs with means and spread over seeds, and samples side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t

from rlft.errors import ConfigError, nearest
from rlft.report.runs import Run
from rlft.trainer.progress import printable


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % confidence interval (Student's t over independent seeds).

    The half-width is nan for a single value.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(student_t.ppf(0.975, len(values) - 1)) * error


def results(groups: dict[str, list[Run]], metrics: Sequence[str]) -> str:
    """Return a table with two rows for each group: the metrics before training, and after it as mean ± 95 % interval.

    Raises `ConfigError` for a metric that no run has.
    """
    known = sorted({name for runs in groups.values() for run in runs for name in run.summary["evaluation"]["after"]})
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"no run has the metric {metric}{nearest(metric, known)}; there are {', '.join(known)}")
    lines = ["| runs | seeds | " + " | ".join(metrics) + " |", "|---" * (2 + len(metrics)) + "|"]
    for name, runs in groups.items():
        before = [interval([run.summary["evaluation"]["before"].get(m, math.nan) for run in runs])[0] for m in metrics]
        lines.append(f"| {name}, before training | | " + " | ".join(map(_number, before)) + " |")
        cells = []
        for metric in metrics:
            values = [run.summary["evaluation"]["after"].get(metric) for run in runs]
            counted = [value for value in values if value is not None]
            mean, half = interval(counted) if counted else (math.nan, math.nan)
            cells.append(_number(mean) + ("" if math.isnan(half) else f" ± {_number(half)}"))
        lines.append(f"| {name} | {', '.join(str(run.seed) for run in runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def samples(groups: dict[str, list[Run]], count: int) -> str:
    """Return the first `count` held-out prompts with the completions before and after training, the first seed's."""
    parts = []
    for name, (run, *_) in groups.items():
        untouched, all_last = run.samples(0), run.samples(run.evaluations[-1]["step"])
        last = all_last[-len(untouched) :]  # an early-stopped run ends with a second evaluation, of its best policy
        lines = [f"#### {name}, seed {run.seed}", "", "| prompt | before | after |", "|---|---|---|"]
        for before, after in list(zip(untouched, last, strict=True))[:count]:
            lines.append(f"| {_cell(before['prompt'])} | {_scored(before)} | {_scored(after)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def provenance(groups: dict[str, list[Run]]) -> str:
    """Return a sentence with commits, versions, hardware and the seconds that the runs took."""
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
