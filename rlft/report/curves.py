"""Plots: metrics over training, and reward against KL, with 95 % confidence bands over seeds."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, without a window
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from rlft.core.errors import ConfigError, nearest
from rlft.report.markdown import KL, REWARD, interval
from rlft.report.runs import FinishedRun

STYLES = ("-", "--", ":")  # together with ten colours, they distinguish thirty settings
MOST_BANDS = 6  # with more settings, bands would hide the lines and are not drawn; the table has the intervals
WIDE_KL = 20.0  # nats; if the KL's axis is longer, it is logarithmic above 1
SMOOTHED = 50  # points of a training curve; each is the mean of a block of rows


def draw(groups: dict[str, list[FinishedRun]], path: Path, *, reward: str = REWARD) -> None:
    """Draw `reward` over completion tokens (left) and against the KL per completion (right) into a PNG file.

    Lines are means over seeds at each evaluation, bands their 95 % intervals (drawn for few settings), and points are
    single runs. Runs without `reward`, such as supervised ones, are left out.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4 + 0.15 * max(0, len(groups) - 5)), layout="constrained")
    for (name, runs), style in zip(groups.items(), _styles(), strict=False):
        rows = list(zip(*([row for row in run.evaluations if reward in row] for run in runs), strict=False))
        if not rows:
            continue
        if len(rows) == 1:  # a policy that was only evaluated is not drawn on the left
            rows = [tuple(row | {"num_tokens": math.nan} for row in rows[0])]
        tokens, values = ([[row.get(key, 0) for row in at] for at in rows] for key in ("num_tokens", reward))
        _band(left, tokens, values, label=name, is_shown=len(groups) <= MOST_BANDS, **style)
        if all(KL in row for at in rows for row in at):
            points = [(row[KL], row[reward]) for at in rows for row in at]
            right.scatter(*zip(*points, strict=True), s=9, alpha=0.6, color=style["color"])
            means = [(interval([row[KL] for row in at])[0], interval([row[reward] for row in at])[0]) for at in rows]
            right.plot(*zip(*means, strict=True), alpha=0.6, label=name, **style)
    left.set(xlabel="completion tokens", ylabel=f"held-out {reward.removeprefix('eval/')}")
    right.set(xlabel="KL to the reference, nats a completion")
    if right.get_xlim()[1] > WIDE_KL:
        right.set_xscale("symlog", linthresh=1.0)
        right.set_xlim(left=0.0)
    _save(figure, [left, right], path)


def draw_training(groups: dict[str, list[FinishedRun]], path: Path, metrics: Sequence[str]) -> None:
    """Draw metrics of metrics.jsonl over tokens, each in its own panel, into a PNG file; lines and bands as in `draw`.

    Rows are averaged in about 50 blocks per run. Raises `ConfigError` for a metric that no run has.
    """
    known = sorted({key for runs in groups.values() for run in runs for row in run.rows for key in row})
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"no run has the metric {metric}{nearest(metric, known)}; there are {', '.join(known)}")
    figure, axes = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 3.2), layout="constrained", squeeze=False)
    for panel, metric in zip(axes[0], metrics, strict=True):
        for (name, runs), style in zip(groups.items(), _styles(), strict=False):
            rows = [[row for row in run.rows if metric in row] for run in runs]
            size = max(1, round(max(map(len, rows)) / SMOOTHED))
            curves = [_blocks(of_run, metric, size) for of_run in rows]
            points = [point for point in zip(*curves, strict=False) if point]
            if points:
                tokens, values = ([[pair[i] for pair in at] for at in points] for i in (0, 1))
                _band(panel, tokens, values, label=name, is_shown=len(groups) <= MOST_BANDS, **style)
        panel.set(xlabel="tokens", title=metric)
    _save(figure, list(axes[0]), path)


def _blocks(rows: list[dict], metric: str, size: int) -> list[tuple[float, float]]:
    """Return the mean tokens and mean value of each block of `size` rows; the first row is a block of its own."""
    first, rest = rows[:1], rows[1:]
    blocks = ([first] if first else []) + [rest[i : i + size] for i in range(0, len(rest), size)]
    return [
        (sum(row.get("num_tokens", 0) for row in block) / len(block), sum(row[metric] for row in block) / len(block))
        for block in blocks
    ]


def _band(axes: Any, x: list[list[float]], y: list[list[float]], *, label: str, is_shown: bool, **style: Any) -> None:
    """Plot means over seeds with their intervals; `x` and `y` hold, for each point, the list of the seeds' values."""
    places = [sum(values) / len(values) for values in x]
    means, halves = zip(*map(interval, y), strict=True)
    axes.plot(places, means, marker="." if len(places) <= SMOOTHED / 2 else None, label=label, **style)
    low = [mean - half for mean, half in zip(means, halves, strict=True)]
    high = [mean + half for mean, half in zip(means, halves, strict=True)]
    if is_shown:
        axes.fill_between(places, low, high, alpha=0.15, linewidth=0, color=style["color"])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _styles() -> Iterator[dict[str, Any]]:
    return itertools.cycle({"color": f"C{colour}", "linestyle": line} for line in STYLES for colour in range(10))


def _save(figure: Any, panels: list[Any], path: Path) -> None:
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    where = (
        panels[0].legend if len(named) <= MOST_BANDS else functools.partial(figure.legend, loc="outside right upper")
    )
    where(named.values(), named.keys(), fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
