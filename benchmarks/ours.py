"""Times rlft's steps on the peers' work (benchmarks/peers/): prints one JSON line.

    OMP_NUM_THREADS=2 python -m benchmarks.ours grpo --preset char10m --prompts 8 --group 8 --plen 32 --clen 64

Models, prompts, sizes, rewards and optimizer are the peers'. What is timed is `Trainer.step`: everything but writing
metrics, and with it everything that a run does between two optimizer steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlft import build
from rlft.config import checked
from rlft.core.batch import Rows
from rlft.cpu.memory import restart_with_huge_pages
from rlft.models.heads import Critic
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from rlft.tracking import efficiency
from rlft.tracking.progress import Progress

PRESETS = {  # layers, heads, width, vocabulary
    "tiny": (2, 2, 32, 96), "char400k": (4, 3, 96, 96), "char2m": (4, 4, 192, 96), "char10m": (6, 6, 384, 96),
    "char40m": (8, 10, 640, 96), "gpt2": (12, 12, 768, 50257),
}  # fmt: skip
ALPHABET = "".join(chr(32 + i) for i in range(95))  # printable ASCII; the last id of 96 is the end of a text


def reward(completions: list[str], **_: Any) -> list[float]:
    """Cheap, deterministic, and not the same within a group."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def prompts(args: argparse.Namespace, count: int) -> list[str]:
    draws = torch.Generator().manual_seed(args.seed)

    def length() -> int:
        return int(torch.randint(8, args.plen + 1, (1,), generator=draws)) if args.ragged else args.plen

    return ["".join(ALPHABET[i] for i in torch.randint(0, 95, (length(),), generator=draws)) for _ in range(count)]


def overrides(args: argparse.Namespace, directory: Path) -> list[str]:
    layers, heads, width, vocab_size = PRESETS[args.preset]
    vocab_size = args.vocab or vocab_size
    made = [
        "name=benchmark", "model=char_scratch", f"model.vocab_size={vocab_size}", "model.n_positions=1024",
        f"model.n_embd={width}", f"model.n_layer={layers}", f"model.n_head={heads}", "model.tokenizer.source=null",
        "tracker=none", f"micro_batch={args.micro}", "learning_rate=1e-5", "max_grad_norm=1.0", f"seed={args.seed}",
        f"max_new_tokens={args.clen}", f"prompts_per_step={args.prompts}", f"group_size={args.group}",
        f"hardware={args.hardware}", f"rollout_rows={args.rows}",
    ]  # fmt: skip
    if args.work == "sft":
        text = directory / "text.txt"
        text.write_text("\n\n".join(prompts(argparse.Namespace(seed=0, ragged=False, plen=4096), 64)))
        return [
            *made, "algo=sft", "reward=[]", "reference=none", "data=text", f"data.source.path={text}",
            f"data.block_size={args.plen}", f"algo.rows_per_step={args.prompts}",
        ]  # fmt: skip
    file = directory / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(args, 40 * args.prompts)))
    made += [
        "data=prompts", f"data.source.path={file}", "reward=custom", f"reward.custom.function={Path(__file__)}:reward",
        f"algo={args.work}",
    ]  # fmt: skip
    if args.work == "ppo":
        return [*made, "algo.kl.coef=0.05"]
    is_held = args.beta > 0
    return [*made, f"algo.kl.coef={args.beta}", f"reference={'initial' if is_held else 'none'}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["grpo", "ppo", "sft", "generate"])
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--hardware", default="cpu")
    parser.add_argument("--vocab", type=int, help="of another size than the preset's")
    parser.add_argument("--rows", default="null", help="completions sampled at once")
    parser.add_argument("--micro", default="null", help="rows in one forward-backward")
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--ragged", action="store_true", help="prompts of 8 to plen tokens, ends where the model says")
    for name, default in {
        "prompts": 2, "group": 4, "plen": 16, "clen": 16, "steps": 5, "warmup": 2, "seed": 0
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with initialize_config_dir(str(build.CONF), version_base="1.3"):
            work = argparse.Namespace(**(vars(args) | {"work": "grpo" if args.work == "generate" else args.work}))
            config = compose("train", overrides=overrides(work, directory))
        OmegaConf.update(config, "model.tokenizer.alphabet", ALPHABET, force_add=True)
        job = build.build(checked(config))
        if not args.ragged:
            job.run.tokenizer.eos_id = None  # every completion has its full length, as the peers' are made to
        seconds, parts = generation(args, job) if args.work == "generate" else steps(args, job, directory)
    print(
        json.dumps(
            vars(args)
            | {"step_s": statistics.median(seconds), "steps": seconds, "parts": parts}
            | {"product_gflops": efficiency.measured_ceiling(torch.device("cpu"), torch.float32) / 1e9}
            | {"params": job.run.policy.num_parameters()}
            | {"threads": torch.get_num_threads(), "torch": torch.__version__}
        )
    )


def steps(args: argparse.Namespace, job: build.Job, directory: Path) -> tuple[list[float], dict[str, float]]:
    """Return the seconds of each batch that counts, and the median seconds of each part of it."""
    progress = Progress(total_steps=0, interactive=False)
    trainer = build.trainer(job, run_dir=directory, progress=progress)
    updates, seconds, rows = job.algorithm.updates_per_batch, [], []
    for batch in range(args.warmup + args.steps):
        began = time.perf_counter()
        made = [trainer.step(batch * updates + update) for update in range(updates)]
        if batch >= args.warmup:
            seconds.append(time.perf_counter() - began)
            rows.append(made)
    names = sorted({key for made in rows for row in made for key in row if key.startswith("time/")})
    parts = {name: statistics.median(sum(row.get(name, 0.0) for row in made) for made in rows) for name in names}
    has_critic = isinstance(job.algorithm.head, Critic)  # a model of its own, as large as the policy
    if not has_critic:  # the metric counts the policy alone
        parts["update_mfu"] = statistics.median(row["efficiency/update_mfu"] for made in rows for row in made)
    # Passes over a batch that are really needed: a backward is two, and a rollout reads what it then scores.
    online = args.work != "sft"
    passes = 3 * updates * (1 + has_critic) + online + (online and job.run.reference is not None) + has_critic
    assert trainer.batch is not None
    parts["mfu"] = passes * share(job, trainer.batch.rows, statistics.median(seconds))
    return seconds, parts


def share(job: build.Job, rows: Rows, seconds: float) -> float:
    """Return the operations of one needed pass over the rows a second, over the rate of a matrix product."""
    ceiling = efficiency.measured_ceiling(job.accelerator.device, torch.float32)
    return efficiency.forward_flops(job.run.policy, rows) / seconds / ceiling


def generation(args: argparse.Namespace, job: build.Job) -> tuple[list[float], dict[str, float]]:
    texts, seconds = prompts(args, args.prompts), []
    ids = job.run.tokenizer.encode_batch(texts)
    for step in range(args.warmup + args.steps):
        began = time.perf_counter()
        rollout = generate(
            job.run.policy, ids, group_size=args.group, sampling=Sampling(args.clen), eos_id=job.run.tokenizer.eos_id,
            seed=args.seed, step=step,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
    seconds = seconds[args.warmup :]
    return seconds, {"mfu": share(job, rollout.rows, statistics.median(seconds))}


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
