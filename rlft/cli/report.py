"""rlft report: a table, samples and plots of finished runs.

RUNS are run directories, or directories that contain some; runs with the same `name` are seeds of one setting.
Writes DIRECTORY/results.md, curves.png if the runs have the reward, and training.png with --train.
"""

from __future__ import annotations

from pathlib import Path

from rlft.cli.parser import Parser, output_directory
from rlft.core.errors import ConfigError

METRICS = (
    "eval/reward",
    "eval/reward_std",
    "eval/kl_completion",
    "eval/distinct_2",
    "eval/reference_perplexity",
    "eval/completions/mean_length",
)


def parser() -> Parser:
    examples = ("rlft report outputs/grpo --out report", "rlft report outputs --out report --samples 2 --train kl")
    report = Parser("report", __doc__, examples=examples)
    report.add_argument("runs", nargs="+", type=Path)
    report.add_argument("--out", type=Path, required=True, help="directory of results.md and curves.png")
    report.add_argument("--metrics", nargs="+", help="columns of the table, by their names in summary.json")
    report.add_argument("--reward", help="the metric to plot; by default eval/reward, if the runs have it")
    report.add_argument("--samples", type=int, default=0, help="held-out samples to show, before and after training")
    report.add_argument("--at-kl", nargs="+", type=float, default=[], help="add columns: the reward at a KL of N nats")
    report.add_argument("--train", nargs="+", default=[], help="metrics of metrics.jsonl to plot over training")
    return report


def run(arguments: list[str]) -> int:
    args = parser().parse(arguments)
    output_directory(args.out)
    try:
        from rlft.report import curves, markdown
        from rlft.report.runs import read_groups
    except ImportError as error:
        raise ConfigError(f"{error}: pip install 'rlft[plots]'") from error
    groups = read_groups(args.runs)
    known = [metric for runs in groups.values() for run in runs for metric in run.summary["evaluation"]["after"]]
    reward = args.reward or (markdown.REWARD if markdown.REWARD in known else None)
    shown = args.metrics or [metric for metric in METRICS if metric in known] or sorted(set(known))
    columns = list(dict.fromkeys([*([reward] if reward else []), *shown]))
    parts = [markdown.results(groups, columns, reward=reward or markdown.REWARD, kls=args.at_kl)]
    parts.append(markdown.provenance(groups))
    if args.samples:
        parts.append(markdown.samples(groups, args.samples))
    (args.out / "results.md").write_text("\n\n".join(parts) + "\n")
    if reward:
        curves.draw(groups, args.out / "curves.png", reward=reward)
    if args.train:
        curves.draw_training(groups, args.out / "training.png", args.train)
    print("\n\n".join(parts[:2]))
    return 0
