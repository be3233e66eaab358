"""What the tests of algorithms and trainer are made of: a tiny policy over 12 tokens, fixed data, silent displays."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlft import build
from rlft.algos.base import Algorithm, Run
from rlft.algos.offline.sft import SFT
from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.config import root_settings
from rlft.core.metrics import Clock
from rlft.core.rng import generator, order
from rlft.data.prompts import Prompt
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.rewards.compose import RewardSum
from rlft.text.characters import characters
from rlft.trainer.trainer import Trainer
from rlft.verify.enumerable import ExactRewards

CONF = build.CONF
ALPHABET = "abcdefghijk"  # ids 0 .. 10; 11 ends a text
CPU = torch.device("cpu")
TOKENIZER = characters(alphabet=ALPHABET)


def tiny(seed: int = 0, *, spread: float = 0.0, n_layer: int = 1, n_embd: int = 16, n_positions: int = 32) -> GPT2:
    """A GPT-2 over 12 tokens; N(0, spread) on top of its weights makes its distributions uneven."""
    model = GPT2.from_config(
        vocab_size=12, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer, n_head=2, seed=seed
    )
    return perturbed(model, seed=seed, spread=spread)


def perturbed(model: GPT2, *, seed: int, spread: float) -> GPT2:
    """Add N(0, spread) to every parameter, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = generator(seed, f"perturb/{name}").standard_normal(parameter.shape)
            parameter += spread * torch.from_numpy(noise).to(parameter.dtype)
    return model


class FixedPrompts:
    """Prompts from a list of texts, the same for training and validation; stands in for `PromptData`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._prompts = [Prompt(t, TOKENIZER.encode(t), {"number": i}, f"list:{i}") for i, t in enumerate(texts)]
        self.counts = {"train_prompts": len(texts)}

    def prompts(self, split: str) -> list[Prompt]:
        return self._prompts

    def batch(self, step: int, *, size: int, seed: int) -> list[Prompt]:
        return [self._prompts[i] for i in order(len(self._prompts), seed=seed, start=step * size, count=size)]


class FixedText:
    """Blocks [N, block_size + 1] to train on and others to validate on; stands in for `TextData`."""

    def __init__(self, train: Tensor, validation: Tensor) -> None:
        self.train, self.held_out, self.block_size = train, validation, train.shape[1] - 1
        self.counts = {"train_blocks": len(train)}

    def batch(self, step: int, *, size: int, seed: int) -> Tensor:
        return self.train[order(len(self.train), seed=seed, start=step * size, count=size)]

    def validation(self, *, max_blocks: int | None = None) -> Tensor:
        return self.held_out[:max_blocks]


Float64Rewards = ExactRewards  # totals in float64; give values that float32 holds exactly


def share_of_a(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The fraction of a completion's tokens, its end token among them, that are "a"."""
    return [text.count("a") / len(ids) for text, ids in zip(completions, completion_ids, strict=True)]


def reward_sum(function: Callable[..., Any], *, cls: type[RewardSum] = RewardSum) -> RewardSum:
    return cls({"r": function}, weights={"r": 1.0}, timeouts={"r": 60.0})


algorithm_node = functools.cache(build.algorithm_node)


def run_of(
    policy: CausalLM,
    data: Any,
    *,
    reference: CausalLM | None = None,
    rewards: RewardSum | None = None,
    rank: int = 0,
    world_size: int = 1,
    is_float32: bool = True,
    **settings: Any,
) -> Run:
    """What a run hands to everyone, on the CPU; small sizes, no limit on a forward, and the root settings given."""
    sizes = {
        "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 5, "eval_prompts": 4, "micro_batch": None,
        "micro_batch_tokens": None,
    }  # fmt: skip
    return Run(
        root_settings(**(sizes | settings)), policy, TOKENIZER, data, reference, rewards, device=CPU, rank=rank,
        world_size=world_size, is_float32=is_float32,
    )  # fmt: skip


def policy_gradient(
    name: str,
    *overrides: str,
    policy: CausalLM,
    rewards: RewardSum | None = None,
    prompts: Sequence[str] = ("abc", "d", "efghi", "jk"),
    data: Any = None,
    parts: dict[str, Any] | None = None,
    **given: Any,
) -> PolicyGradient:
    """Build an algorithm from its YAML; `data` stands in for the prompts, and `parts` replaces built parts."""
    run = run_of(policy, data or FixedPrompts(prompts), rewards=rewards or reward_sum(share_of_a), **given)
    node = algorithm_node(name, overrides, max_new_tokens=run.settings.max_new_tokens)
    return build.algorithm(node, run, **(parts or {}))


def sft(policy: CausalLM, data: FixedText, *, rows_per_step: int = 4, **given: Any) -> SFT:
    return SFT(run_of(policy, data, **({"max_new_tokens": 4} | given)), rows_per_step=rows_per_step, eval_blocks=None)


class Silent:
    """Tracker and progress in one, which remembers what it was told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.messages: list[str] = []
        self.titles: list[Any] = []

    def log(self, step: int, row: dict) -> None:
        self.rows.append((step, row))

    def step(self, step: int, row: dict) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)

    def samples(self, title: Any, samples: list[dict]) -> None:
        self.titles.append(title)


def trainer(policy: CausalLM, algorithm: Any, run_dir: Path, **changes: Any) -> Trainer:
    """A trainer on the CPU with small settings; `trainer.tracker` and `trainer.progress` are one `Silent`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "seed": 0, "steps": 4, "micro_batch": None, "learning_rate": 1e-2, "save_every": 0, "keep": 2,
    }  # fmt: skip
    silent: Any = Silent()
    clock = algorithm.run.clock if isinstance(algorithm, Algorithm) else Clock()
    run = Run(root_settings(**(defaults | changes)), policy, TOKENIZER, data=None, clock=clock)
    return Trainer(run, algorithm, accelerator=Accelerator(cpu=True), run_dir=run_dir, tracker=silent, progress=silent)


def rows_of(path: Path, *, times: bool = False) -> list[dict]:
    """The rows of a JSONL file, without what is measured by a clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if times or not is_measured(k)} for r in rows]


def is_measured(name: str) -> bool:
    """Whether a metric comes from a clock or the operating system; all others are the same in two runs of one seed."""
    clocked = ("wall_time", "step_time", "tokens_per_second", "efficiency/update_mfu", "memory/peak_gib")
    return name in clocked or name.startswith("time/")
