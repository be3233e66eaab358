"""rlft eval: policies on the same held-out prompts, side by side.

POLICY is a run directory, one of its checkpoints, a model in Hugging Face format, or a name on its hub. Data, rewards
and sampling are those of the first POLICY that is a run, or the defaults of `rlft train`; SETTING=VALUE changes them
(eval_prompts=64, temperature=0.7, reward=length, data.source.path=mine.jsonl). With reference=initial the KL is against
the policy that each run began with. All policies get the same prompts and random draws. Prompts that are cut to so many
tokens differ between tokenizers; then no difference between the policies is given.

Writes DIRECTORY/eval.json, eval.md and samples.jsonl. Intervals are 95 %, over prompts.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlft.cli.parser import Parser, output_directory
from rlft.core.errors import ConfigError

if TYPE_CHECKING:
    from rlft.cli.policies import NamedPolicy
    from rlft.config import RootConfig

Z = 1.959964  # half of a 95 % interval in standard errors, for a normal distribution
REWARD = "eval/reward"
NO_TRACKER = {"_target_": "rlft.tracking.trackers.NullTracker"}


def parser() -> Parser:
    several = "rlft eval outputs/grpo/* package:rlft/assets/tiny eval_prompts=64 --out report"
    evaluate = Parser("eval", __doc__, examples=("rlft eval outputs/grpo/2026-01-01_12-00-00-s0", several))
    evaluate.add_argument("policies", nargs="+", metavar="POLICY | SETTING=VALUE")
    evaluate.add_argument("--out", type=Path, help="where to write; outputs/eval/<date>_<time> if left out")
    evaluate.add_argument("--samples", type=int, default=0, metavar="N", help="completions to show for each policy")
    evaluate.add_trusted_modules()
    return evaluate


def run(arguments: list[str]) -> int:
    args = parser().parse(arguments)
    overrides = [word for word in args.policies if _is_setting(word)]
    names = [word for word in args.policies if word not in overrides]
    if not names:
        raise ConfigError("no policy is given: rlft eval RUN, or a model's directory; rlft eval --help has examples")
    from rlft.cli.overrides import changed
    from rlft.cli.policies import named_policy

    policies = [named_policy(name, trusted=tuple(args.trusted_modules)) for name in dict.fromkeys(names)]
    first_run = next((policy.run for policy in policies if policy.run is not None), None)
    base = replace(changed(first_run, overrides), resume=False, tracker=NO_TRACKER)
    if args.out is not None and (args.out / "config.yaml").exists():
        raise ConfigError(f"--out {args.out} is a run directory, whose samples.jsonl would be lost: name another one")
    out = output_directory(args.out or Path("outputs") / "eval" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    began = time.perf_counter()
    found = [_evaluate(policy, base) for policy in policies]
    for one in found[1:]:
        one["difference"] = _difference(one["samples"], found[0]["samples"])
    _write(out, found, base, seconds=time.perf_counter() - began)
    _show(found, num_samples=args.samples)
    print(f"rlft: {out / 'eval.json'}, {out / 'eval.md'}, {out / 'samples.jsonl'}")
    return 0


def _is_setting(word: str) -> bool:
    """Tell SETTING=VALUE from a path, which may contain an equals sign too."""
    from rlft.config import GROUPS

    key = word.partition("=")[0].lstrip("+~")
    is_name = all(part.replace("_", "").isalnum() for part in key.replace("/", ".").split("."))
    return "=" in word and is_name and ("/" not in key or key.partition("/")[0] in GROUPS) and not Path(word).exists()


def _evaluate(policy: NamedPolicy, base: RootConfig) -> dict[str, Any]:
    """Return a policy's metrics and samples under the common settings."""
    from rlft import build

    job = build.build(policy.settings(base))
    if policy.run is not None:  # built as it was before training, for the reference: load what was trained
        trained, _ = policy.load()
        job.run.policy.load_state_dict(trained.state_dict())
        if job.algorithm.head is not None:
            job.algorithm.head.load_state_dict(policy.head())
    if not job.algorithm.is_evaluated:
        raise ConfigError(f"the data of {policy.name} holds nothing out: give data.source.validation=0.1")
    job.run.policy.eval()
    evaluation = job.algorithm.evaluate()
    rewards = [row["reward"] for row in evaluation.samples if row.get("reward") is not None]
    return {
        "policy": policy.name,
        "weights": str(policy.weights),
        "metrics": evaluation.metrics,
        "reward_interval": _half_width(rewards),
        "device": str(job.accelerator.device),
        "samples": evaluation.samples,
    }


def _half_width(values: list[float]) -> float | None:
    """Return half of a 95 % interval of the values' mean; None for fewer than two values that are not nan."""
    counted = [value for value in values if not math.isnan(value)]
    if len(counted) < 2:
        return None
    mean = math.fsum(counted) / len(counted)
    variance = math.fsum((value - mean) ** 2 for value in counted) / (len(counted) - 1)
    return Z * math.sqrt(variance / len(counted))


def _difference(samples: list[dict], others: list[dict]) -> dict[str, float | None] | None:
    """Return the mean difference of two policies' rewards on the same prompts, with half of its 95 % interval.

    None if there are no rewards, or if the prompts differ (those cut to a number of tokens, with other tokenizers).
    """
    if [sample["prompt"] for sample in samples] != [other["prompt"] for other in others]:
        return None
    pairs = [(a.get("reward"), b.get("reward")) for a, b in zip(samples, others, strict=True)]
    values = [a - b for a, b in pairs if a is not None and b is not None and not math.isnan(a - b)]
    if not values:
        return None
    return {"mean": math.fsum(values) / len(values), "interval": _half_width(values), "prompts": len(values)}


def _write(out: Path, found: list[dict[str, Any]], base: RootConfig, *, seconds: float) -> None:
    from rlft.run import provenance

    out.mkdir(parents=True, exist_ok=True)
    policies = [{key: value for key, value in one.items() if key != "samples"} for one in found]
    whole = {"policies": policies, "settings": asdict(base), "seconds": round(seconds, 1)}
    whole |= provenance(found[0]["device"])
    (out / "eval.json").write_text(json.dumps(whole, indent=2) + "\n")
    with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
        for one in found:
            for sample in one["samples"]:
                file.write(json.dumps({"policy": one["policy"]} | sample, ensure_ascii=False) + "\n")
    rows = _rows(found)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    (out / "eval.md").write_text("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n")


def _rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table: a row for each metric, a column for each policy; rewards have intervals."""
    names = list(dict.fromkeys(name for one in found for name in one["metrics"]))
    rows = [["", *(one["policy"] for one in found)]]
    for name in names:
        cells = [_number(one["metrics"].get(name)) for one in found]
        if name == REWARD:
            cells = [_with_interval(cell, one["reward_interval"]) for cell, one in zip(cells, found, strict=True)]
        rows.append([name, *cells])
        if name == REWARD and any(one.get("difference") for one in found):
            differences = [one.get("difference") for one in found]
            cells = ["–" if d is None else _with_interval(f"{d['mean']:+.4f}", d["interval"]) for d in differences]
            rows.append(["difference to the first", *cells])
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4f}"


def _with_interval(cell: str, half: float | None) -> str:
    return cell if half is None else f"{cell} ± {half:.4f}"


def _show(found: list[dict[str, Any]], *, num_samples: int) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from rlft.core.printable import printable

    console = Console()
    head, *rows = _rows(found)
    table = Table(Column(head[0], no_wrap=True), *(Column(name, overflow="fold") for name in head[1:]))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for one in found if num_samples else []:
        console.rule(printable(one["policy"]))
        for sample in one["samples"][:num_samples]:
            reward = sample.get("reward")
            prompt, completion = printable(sample["prompt"]), printable(sample["completion"])
            console.print(f"{prompt} → {completion}" + ("" if reward is None else f" ({reward:+.2f})"), markup=False)
