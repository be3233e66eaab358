"""How a GRPO step's time and memory grow with each size: benchmarks/curves.json, curves.md and curves.png.

    python -m benchmarks.curves            # nothing else may run on the machine; about ten minutes on two cores

Each point is a fresh process of `benchmarks.ours`. The exponent is the slope of log(seconds) over log(size) between the
two largest sizes, where fixed costs weigh least: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import torch

from benchmarks.ours import PRESETS
from benchmarks.versus import line
from rlft.run import source_commit

HERE = Path(__file__).parent
BASE = {"preset": "char2m", "prompts": 4, "group": 8, "plen": 32, "clen": 32}
SWEEPS: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "group size": ("group", (2, 4, 8, 16, 32, 64)),
    "prompt length, tokens": ("plen", (16, 64, 256, 480, 960)),
    "completion length, tokens": ("clen", (16, 32, 64, 128, 256, 512)),
    "vocabulary": ("vocab", (96, 1000, 8000, 50257)),
    "parameters": ("preset", ("tiny", "char400k", "char2m", "char10m", "char40m", "gpt2")),
}


def point(name: str, value: int | str, *, steps: int) -> dict:
    settings = BASE | {name: value}
    flags = [text for key, setting in settings.items() for text in (f"--{key}", str(setting))]
    made = line([sys.executable, "-m", "benchmarks.ours", "grpo", *flags, "--steps", str(steps), "--warmup", "1"])
    size = made["params"] if name == "preset" else value
    return {"size": size, "seconds": made["step_s"], "range": [min(made["steps"]), max(made["steps"])]} | {
        "gib": made["rss_gb"], "parts": made["parts"],
    }  # fmt: skip


def exponent(points: list[dict], key: str) -> float:
    a, b = points[-2:]
    return math.log(b[key] / a[key]) / math.log(b["size"] / a["size"])


def rendered(results: dict[str, list[dict]], provenance: str) -> str:
    lines = [
        "| size | from, to | seconds a step | peak GiB | exponent of time | of memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, points in results.items():
        a, b = points[0], points[-1]
        lines.append(
            f"| {name} | {a['size']:,}, {b['size']:,} | {a['seconds']:.3g}, {b['seconds']:.3g} | {a['gib']:.2f}, "
            f"{b['gib']:.2f} | {exponent(points, 'seconds'):.2f} | {exponent(points, 'gib'):.2f} |"
        )
    return "\n".join([*lines, "", provenance]) + "\n"


def draw(results: dict[str, list[dict]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(3.2 * len(results), 5.4), sharey="row", layout="tight")
    for column, (name, points) in enumerate(results.items()):
        sizes = [p["size"] for p in points]
        for row, (key, label) in enumerate((("seconds", "seconds a step"), ("gib", "peak memory, GiB"))):
            axis = axes[row][column]
            values = [p[key] for p in points]
            axis.loglog(sizes, values, marker="o", label="measured")
            axis.loglog(sizes, [values[-1] * size / sizes[-1] for size in sizes], ":", color="grey", label="linear")
            axis.set_title(f"exponent {exponent(points, key):.2f}", fontsize=9)
            axis.set_xlabel(name)
            axis.set_ylabel(label if not column else "")
            everything = [p[key] for points in results.values() for p in points]
            axis.set_ylim(min(everything) / 2, max(everything) * 2)
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7, rotation=45)
            axis.xaxis.set_minor_locator(pyplot.NullLocator())
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SWEEPS), help="sizes whose name holds one of these")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    file = HERE / "curves.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    layers, heads, width, _ = PRESETS[str(BASE["preset"])]
    provenance = (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {source_commit()}, seed 0; "
        f"medians of {args.steps} steps after 1 of warm-up; {platform.machine()}, "
        f"{os.cpu_count()} CPU cores, float32, torch {torch.__version__}. Around: {layers} layers, {heads} heads, "
        f"width {width}, vocabulary 96, 4 prompts of 32 tokens, groups of 8, 32 new ones. The last model's vocabulary "
        f"is 50,257."
    )
    for name, (setting, values) in SWEEPS.items():
        if not any(text in name for text in args.only):
            continue
        results[name] = [point(setting, value, steps=args.steps) for value in values]
        print(name, [(p["size"], round(p["seconds"], 3), p["gib"]) for p in results[name]], flush=True)
        file.write_text(json.dumps({"provenance": provenance, "results": results}, indent=1) + "\n")
        (HERE / "curves.md").write_text(rendered(results, provenance))
    draw(results, HERE / "curves.png")


if __name__ == "__main__":
    main()
