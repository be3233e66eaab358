"""From a batch's number to scored completions: prompts -> rollout -> rewards, with DAPO's refilling of groups."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlft.algos.online.parts import Stateful
from rlft.algos.online.scoring import group_std, score
from rlft.core.errors import ConfigError
from rlft.core.metrics import Clock
from rlft.data.kinds import Kind
from rlft.data.prompts import Prompt, PromptData, prompt_lengths
from rlft.models.base import CausalLM
from rlft.rewards.compose import RewardOutput, RewardSum
from rlft.rollout.engine import Rollout, concatenate, generate, select_prompts
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampled:
    """B = P * group_size scored completions."""

    prompts: list[Prompt]  # P
    rollout: Rollout
    scored: RewardOutput
    group_size: int
    num_draws: int = 1  # times that prompts_per_step prompts were drawn
    greedy_rewards: Tensor | None = None  # [B], of the greedy completion of each row's prompt

    @property
    def prompt_of_row(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    def token_rewards(self, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return rewards `[B, T]`: token-level ones at their tokens, the rest of the total at the last token."""
        mask, total = self.rollout.rows.completion_mask, self.scored.total.nan_to_num(0.0).to(device, dtype)
        rewards = torch.zeros(mask.shape, dtype=dtype, device=device)
        if self.scored.tokens is not None:
            given = torch.tensor([x for row in self.scored.tokens for x in row], dtype=dtype, device=device)
            rewards = rewards.masked_scatter(mask, given)
        last = (torch.arange(len(mask), device=device), mask.sum(dim=1) - 1)
        rewards[last] += total - rewards.sum(dim=1)
        return rewards

    def keep(self, prompts: list[int]) -> Sampled:
        """Return the groups of these prompts (indices in ascending order)."""
        rows = [p * self.group_size + i for p in prompts for i in range(self.group_size)]
        components = {name: values[rows] for name, values in self.scored.components.items()}
        tokens = self.scored.tokens
        return replace(
            self,
            prompts=[self.prompts[p] for p in prompts],
            rollout=select_prompts(self.rollout, prompts, group_size=self.group_size),
            scored=RewardOutput(self.scored.total[rows], components, tokens and [tokens[row] for row in rows]),
        )


class Rollouts(Stateful):
    """Draws this rank's prompts of a batch, samples a group for each and scores it.

    With `max_draws` above 1, groups whose rewards have no spread are replaced by those of further prompts (DAPO, Yu et
    al., arXiv:2503.14476, section 3.2), drawn `prompts_per_step` at a time; after `max_draws` draws the groups without
    spread fill what is left. How many prompts were drawn so far is then state.
    """

    def __init__(
        self,
        *,
        policy: CausalLM,
        rewards: RewardSum,
        data: PromptData,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        clock: Clock,
        rank: int,
        world_size: int,
        prompts_per_step: int,
        group_size: int,
        max_draws: int,
    ) -> None:
        _check_room(data, max_new_tokens=sampling.max_new_tokens, context_length=policy.context_length)
        self.policy, self.rewards, self.data, self.tokenizer = policy, rewards, data, tokenizer
        self.sampling, self.seed, self.device, self.autocast, self.clock = sampling, seed, device, autocast, clock
        self.rank, self.share = rank, prompts_per_step // world_size
        self.prompts_per_step, self.group_size, self.max_draws = prompts_per_step, group_size, max_draws
        self.num_drawn = 0

    def __call__(self, batch_index: int, *, needs_greedy: bool = False) -> Sampled:
        """Return batch `batch_index`; with `needs_greedy` each prompt is also completed greedily and scored."""
        sampled = self._draw(batch_index) if self.max_draws == 1 else self._refilled()
        if not needs_greedy:
            return sampled
        greedy = replace(self.sampling, greedy=True, top_k=0, top_p=1.0)
        rollout = self._generate(sampled.prompts, group_size=1, sampling=greedy, step=batch_index)
        with self.clock("reward"):
            scored = score(self.rewards, self.tokenizer, sampled.prompts, rollout)
        return replace(sampled, greedy_rewards=scored.total.repeat_interleave(self.group_size))

    def plan(self) -> list[tuple[str, str]]:
        samples, new = self.prompts_per_step * self.group_size, self.sampling.max_new_tokens
        return [
            ("samples per step", f"{self.prompts_per_step} prompts x {self.group_size} = {samples:,}"),
            ("new tokens per step", f"at most {samples:,} x {new} = {samples * new:,}"),
        ]

    def state_dict(self) -> dict:
        return {"num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict) -> None:
        self.num_drawn = state["num_drawn"]

    def _draw(self, index: int) -> Sampled:
        prompts = self.data.batch(index, size=self.prompts_per_step, seed=self.seed)
        prompts = prompts[self.rank * self.share : (self.rank + 1) * self.share]
        rollout = self._generate(prompts, group_size=self.group_size, sampling=self.sampling, step=index)
        sampled = Sampled(prompts, rollout, RewardOutput(torch.empty(0), {}), self.group_size)
        with self.clock("reward"):
            return replace(sampled, scored=score(self.rewards, self.tokenizer, sampled.prompt_of_row, rollout))

    def _refilled(self) -> Sampled:
        """Draw until `prompts_per_step` groups have spread; a whole batch is in one process here."""
        with_spread: list[Sampled] = []
        without: list[Sampled] = []
        missing, num_draws = self.prompts_per_step, 0
        while missing > 0 and num_draws < self.max_draws:
            drawn = self._draw(self.num_drawn)
            self.num_drawn, num_draws = self.num_drawn + 1, num_draws + 1
            has_spread = (group_std(drawn.scored.total, group_size=self.group_size) > 0).tolist()
            good = [p for p, spread in enumerate(has_spread) if spread][:missing]
            without.append(drawn.keep([p for p, spread in enumerate(has_spread) if not spread]))
            with_spread.append(drawn.keep(good))
            missing -= len(good)
        for drawn in without:
            kept = drawn.keep(list(range(min(missing, len(drawn.prompts)))))
            with_spread.append(kept)
            missing -= len(kept.prompts)
        parts = [part for part in with_spread if part.prompts]
        components = {
            name: torch.cat([part.scored.components[name] for part in parts]) for name in parts[0].scored.components
        }
        has_tokens = parts[0].scored.tokens is not None
        tokens = [row for part in parts for row in part.scored.tokens or []] if has_tokens else None
        return Sampled(
            [prompt for part in parts for prompt in part.prompts],
            concatenate([part.rollout for part in parts]),
            RewardOutput(torch.cat([part.scored.total for part in parts]), components, tokens),
            self.group_size,
            num_draws,
        )

    def _generate(self, prompts: list[Prompt], *, group_size: int, sampling: Sampling, step: int) -> Rollout:
        with self.autocast():
            return generate(
                self.policy, [p.ids for p in prompts], group_size=group_size, sampling=sampling,
                eos_id=self.tokenizer.eos_id, seed=self.seed, step=step, first_prompt=self.rank * self.share,
                device=self.device, clock=self.clock,
            )  # fmt: skip


def target_ids(prompts: list[Prompt]) -> list[list[int]]:
    """Return each prompt's column `target_ids`, what `algo.target_logprob_coef` reads.

    Raises `ConfigError` for data without it.
    """
    for prompt in prompts:
        targets = prompt.columns.get("target_ids")
        if not isinstance(targets, list) or not all(isinstance(token, int) for token in targets):
            names = ", ".join(prompt.columns) or "none"
            raise ConfigError(
                f"algo.target_logprob_coef reads the column target_ids, a list of token ids, which {prompt.where} does "
                f"not have (its columns: {names}): take data={' or '.join(Kind.CONTEXTS.choices)}, or set it to 0"
            )
    return [prompt.columns["target_ids"] for prompt in prompts]


def _check_room(data: PromptData, *, max_new_tokens: int, context_length: int) -> None:
    """Refuse prompts that leave no room for a whole completion, so that nothing is cut short silently."""
    splits = [data.prompts(split) for split in ("train", "validation")]
    lengths = np.concatenate([prompt_lengths(prompts) for prompts in splits])
    if len(lengths) and lengths.max() + max_new_tokens > context_length:
        number = int(lengths.argmax())
        longest = splits[0][number] if number < len(splits[0]) else splits[1][number - len(splits[0])]
        raise ConfigError(
            f"{longest.where}: a prompt of {len(longest.ids)} tokens and max_new_tokens={max_new_tokens} do not fit "
            f"the model's context of {context_length}: lower max_new_tokens{_shorter(context_length - max_new_tokens)}"
        )


def _shorter(room: int) -> str:
    if room < 1:
        return f" by more than {-room}"
    return (
        f", or have prompts of at most {room} tokens (data.prompt_tokens, or data.max_prompt_tokens with on_long=skip)"
    )
