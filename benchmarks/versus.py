"""rlft beside its peers: the same work in turn, in one run, as ratios of medians.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0    # the peers live in environments of their own
    python -m venv /tmp/ppo && /tmp/ppo/bin/pip install trl==1.12.0
    python -m benchmarks.versus --trl /tmp/trl/bin/python --ppo /tmp/ppo/bin/python

Each round runs the peer and then rlft, each in a fresh process that warms up first; the ratio is the peer's median
seconds over rlft's, over all rounds' steps, and its spread that of the rounds. Run it with nothing else on the machine.
Writes benchmarks/results.json and benchmarks/results.md; rows that are not run again keep what they had.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlft.run import source_commit

HERE = Path(__file__).parent
SMALL = "--preset tiny --prompts 8 --group 8 --plen 32 --clen 64"
MIDDLE = "--preset char10m --prompts 8 --group 8 --plen 32 --clen 64"
LONG = "--preset char10m --prompts 4 --group 8 --plen 256 --clen 32"
RAGGED = "--preset char10m --prompts 8 --group 8 --plen 256 --clen 128 --ragged"
LARGE = "--preset gpt2 --prompts 2 --group 8 --plen 16 --clen 16"


@dataclass(frozen=True)
class Work:
    """A row: what is done, and the arguments with which peer and rlft do it."""

    name: str
    peer: str  # a script under benchmarks/peers/
    peer_arguments: str
    ours: str


WORKS = (
    Work("GRPO, 61 k parameters, 8x8, prompt 32, 64 new", "trl_grpo", SMALL, f"grpo {SMALL}"),
    Work("GRPO, 11 M, 8x8, prompt 32, 64 new", "trl_grpo", MIDDLE, f"grpo {MIDDLE}"),
    Work("the same, with a reference", "trl_grpo", f"{MIDDLE} --beta 0.04", f"grpo {MIDDLE} --beta 0.04"),
    Work("GRPO, 11 M, 4x8, prompt 256, 32 new", "trl_grpo", LONG, f"grpo {LONG}"),
    Work("GRPO, 11 M, prompts of 8-256, at most 128 new", "trl_grpo", RAGGED, f"grpo {RAGGED}"),
    Work("GRPO, GPT-2 124 M, 2x8, prompt 16, 16 new", "trl_grpo", LARGE, f"grpo {LARGE}"),
    Work("generation, GPT-2 124 M, 16 rows, 16 new", "generate", LARGE, f"generate {LARGE}"),
    Work("SFT, 11 M, 16x256, TRL", "trl_sft", "--preset char10m --batch 16 --seqlen 256",
         "sft --preset char10m --prompts 16 --plen 256"),
    Work("SFT, 11 M, 16x256, a plain loop", "loop_sft", "--preset char10m --batch 16 --seqlen 256",
         "sft --preset char10m --prompts 16 --plen 256"),
    Work("PPO, 11 M, 8x8, prompt 32, 64 new", "trl_ppo", "--preset char10m --batch 64 --group 8 --plen 32 --clen 64",
         "ppo --preset char10m --prompts 8 --group 8 --plen 32 --clen 64"),
    Work("PPO, 11 M, 64 rows, prompt 32, 64 new", "trl_ppo", "--preset char10m --batch 64 --plen 32 --clen 64",
         "ppo --preset char10m --prompts 64 --group 1 --plen 32 --clen 64"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default=sys.executable, help="a Python with TRL 1.16")
    parser.add_argument(
        "--ppo", help="a Python with TRL 1.12, the last release with PPO; left out: that row is not run"
    )
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name holds one of these")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="that count, in each round")
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    file, commit = HERE / "results.json", source_commit()  # before this run's results make the tree another one
    results = json.loads(file.read_text()) if file.exists() else {}
    for work in WORKS:
        if (args.only and not any(text in work.name for text in args.only)) or (
            work.peer == "trl_ppo" and not args.ppo
        ):
            continue
        rounds = [measured(work, args) for _ in range(args.rounds)]
        results[work.name] = row(rounds, args.warmup, commit)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "results.md").write_text(rendered(results))
        print(f"{work.name}: {results[work.name]['ratio']:.2f}x", flush=True)


def measured(work: Work, args: argparse.Namespace) -> tuple[dict, dict]:
    """Run the peer and rlft once, in this order, and return their JSON lines, `steps` without the warm-up."""
    python = args.ppo if work.peer == "trl_ppo" else args.trl
    counts = f"--steps {args.steps + args.warmup}"
    counts += "" if work.peer == "trl_ppo" else f" --warmup {args.warmup}"
    peer = line([python, str(HERE / "peers" / f"{work.peer}.py"), *f"{work.peer_arguments} {counts}".split()])
    if len(peer["steps"]) > args.steps:
        peer["steps"] = peer["steps"][args.warmup :]
    counts = f"--steps {args.steps} --warmup {args.warmup}"
    return peer, line([sys.executable, "-m", "benchmarks.ours", *f"{work.ours} {counts}".split()])


def line(command: list[str]) -> dict:
    """Run a command and return the JSON of its last line, with the peak resident memory of its process, `rss_gb`."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(command, stdout=out, stderr=error, env=environment, cwd=HERE.parent)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), error.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{error.read()[-2000:]}")
        return json.loads(out.read().strip().splitlines()[-1]) | {"rss_gb": round(used.ru_maxrss / 2**20, 3)}


def row(rounds: list[tuple[dict, dict]], warmup: int, commit: str | None) -> dict:
    peers, ours = ([step for pair in rounds for step in pair[side]["steps"]] for side in (0, 1))
    ratios = [statistics.median(a["steps"]) / statistics.median(b["steps"]) for a, b in rounds]
    first, second = rounds[0]
    return {
        "ratio": statistics.median(peers) / statistics.median(ours),
        "of_rounds": ratios,
        "peer_s": statistics.median(peers), "peer_range": [min(peers), max(peers)],
        "ours_s": statistics.median(ours), "ours_range": [min(ours), max(ours)],
        "parts": {
            name: statistics.median(pair[1]["parts"][name] for pair in rounds) for name in second.get("parts", {})
        },
        "rss_gb": [first["rss_gb"], second["rss_gb"]],
        "steps": len(ours), "warmup": warmup,
        "versions": {"trl": first.get("trl"), "transformers": first.get("tf"), "torch": second["torch"]},
        "threads": second["threads"], "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "date": datetime.date.today().isoformat(), "commit": commit,
    }  # fmt: skip


def provenance(one: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version)
    return (
        f"{one['date']}, commit {one['commit']}, seed 0; {one['steps']} steps, after {one['warmup']} of warm-up in "
        f"each round; {one['machine']}, "
        f"{one['threads']} threads, float32; {versions}"
    )


def rendered(results: dict) -> str:
    lines = [
        "| work | peer, s | rlft, s | ratio | of each round | of the product rate: step, update | peak memory, peer "
        "and rlft | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        (low, high), (our_low, our_high) = one["peer_range"], one["ours_range"]
        rounds = ", ".join(f"{ratio:.2f}" for ratio in one["of_rounds"])
        memory = ", ".join(f"{gb:.2f}" for gb in one["rss_gb"])
        shares = ", ".join(f"{one['parts'][name]:.0%}" for name in ("mfu", "update_mfu") if name in one["parts"])
        lines.append(
            f"| {name} | {one['peer_s']:.3g} ({low:.3g} to {high:.3g}) | {one['ours_s']:.3g} ({our_low:.3g} to "
            f"{our_high:.3g}) | **{one['ratio']:.2f}x** | {rounds} | {shares} | {memory} GiB | {provenance(one)} |"
        )
    note = (
        "Seconds a step: median (range). Of the product rate: the operations that are really needed (each prompt once, "
        "no padding, 3 passes for forward and backward, 1 each for a rollout, a reference and old values) a second, "
        "over those of a large float32 matrix product in the same process; for the whole step, and for update and "
        "optimizer alone."
    )
    return "\n".join([*lines, "", note]) + "\n"


if __name__ == "__main__":
    main()
