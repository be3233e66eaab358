"""From runs to a table, samples and a picture: python -m rlft.report RUNS... --out DIRECTORY.

RUNS are run directories, or directories that hold some; runs of the same `name` are seeds of one setting.
Writes DIRECTORY/results.md and DIRECTORY/curves.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlft.errors import RlftError

METRICS = (
    "eval/reward",
    "eval/reward_std",
    "eval/kl_completion",
    "eval/distinct_2",
    "eval/reference_perplexity",
    "eval/completions/mean_length",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlft.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="directory of results.md and curves.png")
    parser.add_argument("--metrics", nargs="+", help="columns of the table, as in summary.json")
    parser.add_argument("--reward", default="eval/reward", help="the metric that is drawn")
    parser.add_argument("--samples", type=int, default=0, help="held-out samples before and after, for each name")
    args = parser.parse_args(arguments)
    try:
        from rlft.report import curves, table
        from rlft.report.runs import read_groups
    except ImportError as error:
        print(f"rlft: {error}: pip install 'rlft[plots]'", file=sys.stderr)
        return 2
    try:
        groups = read_groups(args.runs)
        known = groups[next(iter(groups))][0].summary["evaluation"]["after"]
        shown = args.metrics or [metric for metric in METRICS if metric in known]
        parts = [table.results(groups, list(dict.fromkeys([args.reward, *shown])))]
    except RlftError as error:
        print(f"rlft: {error}", file=sys.stderr)
        return error.exit_code
    parts.append(table.provenance(groups))
    if args.samples:
        parts.append(table.samples(groups, args.samples))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.md").write_text("\n\n".join(parts) + "\n")
    curves.draw(groups, args.out / "curves.png", reward=args.reward)
    print("\n\n".join(parts[:2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
