"""Completions that a policy draws, what the rewards say of them, and the rows of samples.jsonl that show them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlft.algos.base import Run
from rlft.core.metrics import Clock, Metrics
from rlft.data.prompts import Prompt
from rlft.functional.advantages import centre_groups
from rlft.rewards.compose import RewardOutput, RewardSum
from rlft.rollout.engine import Rollout, concatenate, generate, select_prompts
from rlft.rollout.sampling import Sampling

EVAL_SEED = 0  # of evaluations: their draws are the same in every run
EVAL_STREAM = "eval"
NUM_SHOWN = 5  # samples of an offline algorithm's evaluation


@dataclass(frozen=True)
class Samples:
    """B = P * group_size completions, `group_size` of each prompt."""

    prompts: list[Prompt]  # P
    rollout: Rollout
    texts: list[str]  # [B]
    group_size: int
    scored: RewardOutput | None = None  # None: no reward has seen them
    greedy_rewards: Tensor | None = None  # [B], of the greedy completion of each row's prompt
    num_draws: int = 1  # how often prompts were drawn to fill the batch

    @property
    def prompt_of_row(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    @property
    def rewards(self) -> RewardOutput:
        assert self.scored is not None
        return self.scored

    @property
    def total(self) -> Tensor:
        """The weighted sum of the rewards, [B]; nan where no reward counts a completion."""
        return self.rewards.total

    def score(self, rewards: RewardSum) -> Samples:
        """Return the samples with what the rewards say of each."""
        prompts = self.prompt_of_row
        names = dict.fromkeys(name for p in prompts for name in p.columns)
        scored = rewards(
            prompts=[p.text for p in prompts],
            completions=self.texts,
            completion_ids=self.rollout.completions(),
            columns={name: [p.columns.get(name) for p in prompts] for name in names},
            messages=[p.messages for p in prompts],
        )
        return replace(self, scored=scored)

    def token_rewards(self, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return rewards `[B, T]`: token-level ones at their tokens, the rest of the total at the last token."""
        mask, total = self.rollout.rows.completion_mask, self.total.nan_to_num(0.0).to(device, dtype)
        rewards = torch.zeros(mask.shape, dtype=dtype, device=device)
        if self.rewards.tokens is not None:
            given = torch.tensor([x for row in self.rewards.tokens for x in row], dtype=dtype, device=device)
            rewards = rewards.masked_scatter(mask, given)
        last = (torch.arange(len(mask), device=device), mask.sum(dim=1) - 1)
        rewards[last] += total - rewards.sum(dim=1)
        return rewards

    def keep(self, prompts: list[int]) -> Samples:
        """Return the groups of these prompts (indices in ascending order)."""
        rows = [p * self.group_size + i for p in prompts for i in range(self.group_size)]
        components = {name: values[rows] for name, values in self.rewards.components.items()}
        tokens = self.rewards.tokens
        return replace(
            self,
            prompts=[self.prompts[p] for p in prompts],
            rollout=select_prompts(self.rollout, prompts, group_size=self.group_size),
            texts=[self.texts[row] for row in rows],
            scored=RewardOutput(self.total[rows], components, tokens and [tokens[row] for row in rows]),
            greedy_rewards=None if self.greedy_rewards is None else self.greedy_rewards[rows],
        )

    def rows(self, count: int | None = None) -> list[dict]:
        """Return rows of samples.jsonl of the first `count` completions; None: of all."""
        shown = list(zip(self.prompt_of_row, self.texts, strict=True))[:count]
        rows = [{"prompt": prompt.text, "completion": text} for prompt, text in shown]
        return rows if self.scored is None else [row | self._scores(i) for i, row in enumerate(rows)]

    def _scores(self, i: int) -> dict:
        return {
            "reward": float(self.total[i]),
            "rewards": {name: float(values[i]) for name, values in self.rewards.components.items()},
            "finish_reason": self.rollout.finish_reasons[i],
        }

    def add_rewards(self, metrics: Metrics, *, prefix: str = "") -> None:
        """Add the mean reward and each component's, over the completions that it counts."""
        metrics.add(f"{prefix}reward", self.total, ~self.total.isnan())
        for name, values in self.rewards.components.items():
            metrics.add(f"{prefix}rewards/{name}/mean", values, ~values.isnan())

    def add_rollout(self, metrics: Metrics) -> None:
        """Add rewards, their spread within groups, lengths and finish reasons."""
        self.add_rewards(metrics)
        if self.group_size > 1:
            std = group_std(self.total, group_size=self.group_size)
            metrics.add("reward_std", std)
            metrics.add("frac_reward_zero_std", std == 0)
        lengths = self.rollout.rows.completion_mask.sum(dim=1)
        metrics.add("completions/mean_length", lengths)
        metrics.add_max("completions/max_length", lengths)
        is_clipped = torch.tensor([reason == "length" for reason in self.rollout.finish_reasons])
        metrics.add("completions/clipped_ratio", is_clipped)


def draw(
    run: Run,
    prompts: list[Prompt],
    *,
    sampling: Sampling,
    group_size: int = 1,
    seed: int = EVAL_SEED,
    stream: str = EVAL_STREAM,
    step: int = 0,
    first_prompt: int = 0,
    clock: Clock | None = None,
) -> Samples:
    """Draw `group_size` completions of each prompt, as those of an evaluation unless seed and stream say otherwise."""
    with run.autocast():
        rollout = generate(
            run.policy,
            [prompt.ids for prompt in prompts],
            group_size=group_size,
            sampling=sampling,
            eos_id=run.tokenizer.eos_id,
            seed=seed,
            stream=stream,
            step=step,
            first_prompt=first_prompt,
            device=run.device,
            clock=clock,
        )
    return Samples(prompts, rollout, run.tokenizer.decode_batch(rollout.completions()), group_size)


def joined(parts: list[Samples]) -> Samples:
    """Return several samples of the same group size as one."""
    scored = [part.rewards for part in parts]
    tokens = [row for one in scored for row in one.tokens or []] if scored[0].tokens is not None else None
    components = {name: torch.cat([one.components[name] for one in scored]) for name in scored[0].components}
    return replace(
        parts[0],
        prompts=[prompt for part in parts for prompt in part.prompts],
        rollout=concatenate([part.rollout for part in parts]),
        texts=[text for part in parts for text in part.texts],
        scored=RewardOutput(torch.cat([one.total for one in scored]), components, tokens),
    )


def group_std(rewards: Tensor, *, group_size: int) -> Tensor:
    """Return each group's standard deviation (ddof 1), [P], of rewards [B] without those that are nan."""
    centred, num = centre_groups(rewards, group_size)  # exactly 0 throughout a group of equal rewards
    return (centred.square().sum(dim=1) / (num[:, 0] - 1).clamp(min=1)).sqrt()
