"""The output of a verification: a table (printed, and in Markdown), a JSON file, a plot of the reward-KL frontiers."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draw to a file, without a window
import matplotlib.pyplot as plt
import torch
from rich.table import Table
from rich.text import Text

from rlft.verify import exact, training
from rlft.verify.training import Trained
from rlft.verify.verdict import Row

MARKERS = "os^vD<>pPX*hd8"


def table(rows: list[Row]) -> Table:
    """Return the table that is printed."""
    made = Table("algorithm", "property", "expected", "measured", "verdict", title="rlft verify")
    before = None
    for row in rows:
        verdict = Text(row.verdict, style="green" if row.is_right else "bold red")
        name = "" if row.algorithm == before else row.algorithm
        if before is not None and name:
            made.add_section()
        made.add_row(Text(name), Text(row.claim), Text(expected(row)), Text(f"{row.measured:.4g}"), verdict)
        before = row.algorithm
    return made


def write_markdown(rows: list[Row], path: Path, *, seconds: float) -> None:
    """Write the same table in Markdown, with the machine and the versions."""
    passed = sum(row.is_right for row in rows)
    lines = [
        "# `rlft verify`",
        "",
        f"{passed} of {len(rows)} rows pass; {seconds:.0f} s, one thread of {platform.machine()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}.",
        "",
        "| algorithm | property | expected | measured | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row.algorithm, row.claim, expected(row), f"{row.measured:.4g}", row.verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def expected(row: Row) -> str:
    """Return the values that a row allows, as text."""
    if row.relation == "=":
        return f"{row.expected:.4g}" + (f" ± {row.tolerance:.2g}" if row.tolerance else "")
    return f"{'≤' if row.relation == '<=' else '≥'} {row.expected:.4g}"


def write_json(rows: list[Row], trained: list[Trained], path: Path, *, seconds: float) -> None:
    """Write all rows, the trained policies and the versions; numbers that are not finite become null."""
    content = {
        "rows": [{k: _finite(v) for k, v in row.as_dict().items()} for row in rows],
        "trained": [vars(one) for one in trained],
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def draw(trained: list[Trained], path: Path) -> None:
    """Plot, for each task, the largest reward that a policy can have at each KL, and each algorithm's final policy."""
    courses = {course.name: course for course in training.courses()}
    shown = {name: [one for one in trained if one.task == name] for name in courses}
    panels = [name for name, points in shown.items() if points and courses[name].task.rewards.std() > 0]
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 5), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        task = courses[name].task
        ref_logp = exact.logprobs(task.policy(seed=0, spread=0.0), task).detach()
        best = exact.optimum(ref_logp, task.rewards, beta=courses[name].beta)
        curve = exact.frontier(ref_logp, task.rewards, max_kl=1.5 * max(best.kl, *(one.kl for one in shown[name])))
        axis.plot(*zip(*curve, strict=True), color="0.3", label="frontier: nothing is above")
        axis.scatter(
            [best.kl], [best.reward], marker="+", s=200, color="0.3", label=f"$\\pi^*$, J* = {best.objective:.3f}"
        )
        for i, one in enumerate(shown[name]):
            marker, label = MARKERS[i % len(MARKERS)], f"{one.name}: J* - J = {one.regret:.3f}"
            axis.scatter([one.kl], [one.reward], marker=marker, color=f"C{i % 10}", alpha=0.8, label=label)
        axis.set(title=f"{name}, beta = {courses[name].beta:g}", xlabel="KL to the reference, nats a completion")
        axis.set_ylabel("expected reward")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
