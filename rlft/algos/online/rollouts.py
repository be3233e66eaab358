"""From a batch's number to scored completions: prompts -> rollout -> rewards, with DAPO's refilling of groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlft.algos.base import Run
from rlft.algos.parts import Stateful
from rlft.algos.samples import Samples, draw, group_std, joined
from rlft.core.errors import ConfigError
from rlft.data.kinds import Kind
from rlft.data.prompts import Prompt, PromptData, prompt_lengths
from rlft.rewards.compose import RewardSum
from rlft.rollout.sampling import Sampling


class Rollouts(Stateful):
    """Draws this rank's prompts of a batch, samples a group for each and scores it.

    With `max_draws` above 1, groups whose rewards have no spread are replaced by those of further prompts (DAPO, Yu et
    al., arXiv:2503.14476, section 3.2), drawn `prompts_per_step` at a time; after `max_draws` draws the groups without
    spread fill what is left. How many prompts were drawn so far is then state.
    """

    def __init__(self, run: Run, *, sampling: Sampling, max_draws: int = 1) -> None:
        _check_room(run.data, max_new_tokens=sampling.max_new_tokens, context_length=run.policy.context_length)
        self.run, self.sampling, self.max_draws = run, sampling, max_draws
        self.prompts_per_step, self.group_size = run.settings.prompts_per_step, run.settings.group_size
        self.share = self.prompts_per_step // run.world_size
        self.num_drawn = 0

    def __call__(self, batch_index: int, *, needs_greedy: bool = False) -> Samples:
        """Return batch `batch_index`; with `needs_greedy` each prompt is also completed greedily and scored."""
        samples = self._draw(batch_index) if self.max_draws == 1 else self._refilled()
        if not needs_greedy:
            return samples
        greedy = replace(self.sampling, greedy=True, top_k=0, top_p=1.0)
        scored = self._scored(self._drawn(samples.prompts, group_size=1, sampling=greedy, step=batch_index))
        return replace(samples, greedy_rewards=scored.total.repeat_interleave(self.group_size))

    def plan(self) -> list[tuple[str, str]]:
        samples, new = self.prompts_per_step * self.group_size, self.sampling.max_new_tokens
        return [
            ("samples per step", f"{self.prompts_per_step} prompts x {self.group_size} = {samples:,}"),
            ("new tokens per step", f"at most {samples:,} x {new} = {samples * new:,}"),
        ]

    def rewards_plan(self) -> tuple[str, str]:
        weights = self._rewards.weights.items()
        return ("rewards", ", ".join(f"{weight:g} x {name}" for name, weight in weights))

    def state_dict(self) -> dict:
        return {"num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict) -> None:
        self.num_drawn = state["num_drawn"]

    def _draw(self, index: int) -> Samples:
        prompts = self.run.data.batch(index, size=self.prompts_per_step, seed=self.run.settings.seed)
        prompts = prompts[self.run.rank * self.share : (self.run.rank + 1) * self.share]
        return self._scored(self._drawn(prompts, group_size=self.group_size, sampling=self.sampling, step=index))

    def _refilled(self) -> Samples:
        """Draw until `prompts_per_step` groups have spread; a whole batch is in one process here."""
        with_spread: list[Samples] = []
        without: list[Samples] = []
        missing, num_draws = self.prompts_per_step, 0
        while missing > 0 and num_draws < self.max_draws:
            drawn = self._draw(self.num_drawn)
            self.num_drawn, num_draws = self.num_drawn + 1, num_draws + 1
            has_spread = (group_std(drawn.total, group_size=self.group_size) > 0).tolist()
            good = [p for p, spread in enumerate(has_spread) if spread][:missing]
            without.append(drawn.keep([p for p, spread in enumerate(has_spread) if not spread]))
            with_spread.append(drawn.keep(good))
            missing -= len(good)
        for drawn in without:
            kept = drawn.keep(list(range(min(missing, len(drawn.prompts)))))
            with_spread.append(kept)
            missing -= len(kept.prompts)
        return replace(joined([part for part in with_spread if part.prompts]), num_draws=num_draws)

    @property
    def _rewards(self) -> RewardSum:
        assert self.run.rewards is not None
        return self.run.rewards

    def _drawn(self, prompts: list[Prompt], *, group_size: int, sampling: Sampling, step: int) -> Samples:
        return draw(
            self.run,
            prompts,
            group_size=group_size,
            sampling=sampling,
            seed=self.run.settings.seed,
            stream="rollout",
            step=step,
            first_prompt=self.run.rank * self.share,
            clock=self.run.clock,
        )

    def _scored(self, samples: Samples) -> Samples:
        with self.run.clock("reward"):
            return samples.score(self._rewards)


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
