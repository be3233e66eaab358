"""Curves: the evaluation over training, and reward against KL, with a 95 % band over seeds."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

from rlft.report.runs import Run
from rlft.report.table import interval

REWARD, KL = "eval/reward", "eval/kl_completion"


def draw(groups: dict[str, list[Run]], path: Path, *, reward: str = REWARD) -> None:
    """Draw `reward` over completion tokens (left) and against the KL per completion (right) into a PNG file.

    Lines are means over seeds at equal steps, bands their 95 % intervals; points are single runs' evaluations.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for colour, (name, runs) in enumerate(groups.items()):
        style = {"color": f"C{colour}"}
        steps = sorted(set.intersection(*({row["step"] for row in run.evaluations} for run in runs)))
        rows = [[row for run in runs for row in run.evaluations if row["step"] == step] for step in steps]
        tokens = [interval([row.get("num_tokens", 0) for row in at])[0] for at in rows]
        means, halves = zip(*(interval([row[reward] for row in at]) for at in rows), strict=True)
        left.plot(tokens, means, marker=".", label=name, **style)
        low = [mean - half for mean, half in zip(means, halves, strict=True)]
        high = [mean + half for mean, half in zip(means, halves, strict=True)]
        left.fill_between(tokens, low, high, alpha=0.2, linewidth=0, **style)
        if all(KL in row for at in rows for row in at):
            points = [(row[KL], row[reward]) for at in rows for row in at]
            right.scatter(*zip(*points, strict=True), s=9, alpha=0.6, **style)
            right.plot([interval([row[KL] for row in at])[0] for at in rows], means, alpha=0.6, **style)
    left.set(xlabel="completion tokens", ylabel=f"held-out {reward.removeprefix('eval/')}")
    right.set(xlabel="KL to the reference, nats a completion")
    left.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
