"""From runs to a table, samples and a picture: python -m rlft.report RUNS... --out DIRECTORY.

RUNS are run directories, or directories that hold some; runs of the same `name` are seeds of one setting.
Writes DIRECTORY/results.md, curves.png where the runs have the reward, and training.png with --train.
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
    parser.add_argument("--reward", help="the metric that is drawn; eval/reward where the runs have it")
    parser.add_argument("--samples", type=int, default=0, help="held-out samples before and after, for each name")
    parser.add_argument("--at-kl", nargs="+", type=float, default=[], help="columns: the reward at so many nats of KL")
    parser.add_argument("--train", nargs="+", default=[], help="metrics of metrics.jsonl to draw over training")
    args = parser.parse_args(arguments)
    try:
        from rlft.report import curves, table
        from rlft.report.runs import read_groups
    except ImportError as error:
        print(f"rlft: {error}: pip install 'rlft[plots]'", file=sys.stderr)
        return 2
    try:
        groups = read_groups(args.runs)
        known = [metric for runs in groups.values() for run in runs for metric in run.summary["evaluation"]["after"]]
        reward = args.reward or (table.REWARD if table.REWARD in known else None)
        shown = args.metrics or [metric for metric in METRICS if metric in known] or sorted(set(known))
        columns = list(dict.fromkeys([*([reward] if reward else []), *shown]))
        parts = [table.results(groups, columns, reward=reward or table.REWARD, kls=args.at_kl)]
        parts.append(table.provenance(groups))
        if args.samples:
            parts.append(table.samples(groups, args.samples))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.md").write_text("\n\n".join(parts) + "\n")
        if reward:
            curves.draw(groups, args.out / "curves.png", reward=reward)
        if args.train:
            curves.draw_training(groups, args.out / "training.png", args.train)
    except RlftError as error:
        print(f"rlft: {error}", file=sys.stderr)
        return error.exit_code
    print("\n\n".join(parts[:2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
