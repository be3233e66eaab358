"""Every online algorithm: prompts -> rollout -> rewards -> advantages -> loss, as a composition of small parts.

REINFORCE, RLOO, GRPO, PPO and their kin are choices of an advantage, a surrogate, an aggregation, a KL penalty and
perhaps a critic; each choice is one callable with its formula and paper in its docstring, and the YAML files under
conf/algo/ put them together. A part is called with those of the tensors below that its signature names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from rlft.algos.base import Algorithm, Evaluation
from rlft.algos.online import validate
from rlft.algos.online.agreement import check_sampler
from rlft.algos.online.evaluation import Evaluator
from rlft.algos.online.kl import KLPenalty
from rlft.algos.online.parts import Stateful, call, parameters
from rlft.algos.online.reference import FrozenSide
from rlft.algos.online.rollouts import Rollouts, Sampled, target_ids
from rlft.algos.online.scoring import add_rollout, sample_rows
from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Clock, Means
from rlft.core.ranges import Count, CountOrZero, NonNegative, Positive, Size, SizeOrZero
from rlft.core.rng import order
from rlft.data.kinds import Kind
from rlft.data.prompts import PromptData
from rlft.data.source import holds_out
from rlft.functional import surrogates
from rlft.functional.advantages import whiten
from rlft.functional.aggregation import token_mean
from rlft.functional.kl import k3
from rlft.models.base import CausalLM
from rlft.models.heads import Head
from rlft.models.scorer import Scorer, Scores
from rlft.rewards.compose import RewardSum
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer


class PolicyGradient(Algorithm):
    """A policy-gradient algorithm over sampled completions.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        advantage: from rewards to advantages. A part that takes a `mask` gets token rewards [B, T] (the completion's
            reward at its last token, a KL in the reward at each) and gives [B, T]; any other gets completion rewards
            [B] and gives [B]. One that takes `values` gives advantages and the critic's targets.
        surrogate: per-token loss and statistics. aggregation: from tokens to a scalar.
        kl: the penalty, and what is logged as `kl`.
        critic: makes a value head for the policy, or None. value_coef weighs its loss (a mean over tokens), value_clip
            bounds how far a value moves on one batch, in units of the reward.
        whiten_advantages: zero mean and unit variance over the batch's tokens.
        entropy_coef: entropy bonus, nats to loss units; entropy_decay_batches lets it fall linearly to 0 over so many
            batches.
        prompts_per_step, group_size: over all ranks; samples per prompt.
        epochs, minibatches: passes over a rollout (GRPO's mu) and optimizer steps in a pass; from the second step on
            the ratio departs from 1. target_kl passes the rest over once KL(sampler || policy) is above it, nats a
            token.
        resample_zero_std: draws more prompts, up to so many times prompts_per_step, in place of groups whose rewards
            have no spread (DAPO's dynamic sampling); 0 for off.
        eval_prompts: held-out prompts of an evaluation, one completion each. probe: what else an evaluation measures.
        target_logprob_coef: adds this times the policy's logprob of the data's own next token (column `target_ids`) to
            each token's reward.
        micro_batch, micro_batch_tokens: what one forward of the reference may hold.
        samples_per_step: completions written to samples.jsonl each step.
        top_k, top_p, min_new_tokens: bend the sampled distribution away from the policy's; refused unless
            allow_bent_sampling is set, and then the ratio's denominator is the policy's own logprob.
    """

    reads = (Kind.PROMPTS, Kind.CONTEXTS)
    objective = ("eval/reward", "max")

    def __init__(
        self,
        *,
        policy: CausalLM,
        reference: CausalLM | None,
        rewards: RewardSum,
        data: PromptData,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        is_float32: bool,
        rank: int,
        world_size: int,
        clock: Clock,
        advantage: Callable[..., Tensor | tuple[Tensor, Tensor]],
        surrogate: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        aggregation: Callable[..., Tensor],
        kl: KLPenalty,
        critic: Callable[[CausalLM], Head] | None,
        value_coef: NonNegative,
        value_clip: Positive,
        whiten_advantages: bool,
        entropy_coef: float,
        entropy_decay_batches: Count | None,
        prompts_per_step: Size,
        group_size: Size,
        epochs: Count,
        minibatches: Count,
        target_kl: NonNegative | None,
        resample_zero_std: CountOrZero,
        eval_prompts: Size,
        probe: Callable[..., dict[str, float]] | None,
        target_logprob_coef: float,
        micro_batch: Size | None,
        micro_batch_tokens: Size | None,
        samples_per_step: SizeOrZero,
        top_k: SizeOrZero = 0,
        top_p: float = 1.0,
        min_new_tokens: SizeOrZero = 0,
        allow_bent_sampling: bool = False,
    ) -> None:
        self.sampling = replace(sampling, top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens)
        self.check(
            has_reference=reference is not None, world_size=world_size, advantage=advantage, surrogate=surrogate,
            aggregation=aggregation, kl=kl, critic=critic, prompts_per_step=prompts_per_step, group_size=group_size,
            epochs=epochs, minibatches=minibatches, target_kl=target_kl, whiten_advantages=whiten_advantages,
            entropy_coef=entropy_coef, target_logprob_coef=target_logprob_coef, resample_zero_std=resample_zero_std,
            allow_bent_sampling=allow_bent_sampling,
            top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens,
        )  # fmt: skip
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.seed, self.device, self.autocast, self.is_float32, self.clock = seed, device, autocast, is_float32, clock
        self.advantage, self.surrogate, self.aggregation, self.kl = advantage, surrogate, aggregation, kl
        self.head = None if critic is None else critic(policy)
        self.value_coef, self.value_clip, self.whiten_advantages = value_coef, value_clip, whiten_advantages
        self.entropy_coef, self.entropy_decay_batches, self.entropy_coef_now = entropy_coef, entropy_decay_batches, 0.0
        self.group_size, self.epochs, self.minibatches, self.target_kl = group_size, epochs, minibatches, target_kl
        self.probe, self.target_logprob_coef = probe, target_logprob_coef
        self.updates_per_batch, self.samples_per_step = epochs * minibatches, samples_per_step
        limits = {"max_rows": micro_batch, "max_tokens": micro_batch_tokens}
        self.frozen = FrozenSide(
            policy=policy, reference=reference, kl=kl, head=self.head, sampling=self.sampling, autocast=autocast,
            limits=limits,
        )  # fmt: skip
        self.rollouts = Rollouts(
            policy=policy, rewards=rewards, data=data, tokenizer=tokenizer, sampling=self.sampling, seed=seed,
            device=device, autocast=autocast, clock=clock, rank=rank, world_size=world_size,
            prompts_per_step=prompts_per_step, group_size=group_size, max_draws=max(1, resample_zero_std),
        )  # fmt: skip
        self.evaluator = Evaluator(
            policy=policy, reference=reference, rewards=rewards, data=data, tokenizer=tokenizer,
            sampling=self.sampling, device=device, autocast=autocast, limits=limits,
            has_exact_kl=self.frozen.has_exact, num_prompts=eval_prompts,
        )  # fmt: skip
        if target_logprob_coef:  # whether they have a column of targets, before anything is sampled
            target_ids(data.batch(0, size=1, seed=seed))
        self._batch_index = 0
        self._moved = [0.0, 0.0]  # KL(sampler || policy) of the last update: sum and tokens

    check = staticmethod(validate.check)  # type: ignore[assignment]  # it names the settings that it looks at

    def collect(self, batch_index: int) -> Batch:
        """prompts -> rollout -> rewards -> advantages, for this rank's share of the prompts."""
        self._batch_index = batch_index
        self.kl.start_batch()
        decay = self.entropy_decay_batches
        self.entropy_coef_now = self.entropy_coef * (max(0.0, 1.0 - batch_index / decay) if decay else 1.0)
        sampled = self.rollouts(batch_index, needs_greedy="greedy_rewards" in parameters(self.advantage))
        with self.clock("reference"):
            values = self.frozen.values(sampled.rollout)
        values |= self._advantages(sampled, values)
        means, mask = Means(), sampled.rollout.rows.completion_mask
        add_rollout(means, sampled.scored, sampled.rollout, group_size=self.group_size)
        if self.reference is not None:
            log_ratio = torch.where(mask, values["old_logprobs"] - values["ref_logprobs"], 0.0).double()
            self.kl.end_batch(
                kl_completion=float(log_ratio.sum(dim=1).mean()), num_tokens=int(mask.sum()), num_completions=len(mask)
            )
            means.add("kl_coef", torch.tensor(self.kl.coef))
        if self.rollouts.max_draws > 1:
            means.add("sampling/draws", torch.tensor(float(sampled.num_draws)))
        return Batch(sampled.rollout.rows, values, means, self._samples(sampled, values["advantages"]))

    def minibatch(self, batch: Batch, update: int) -> Batch | None:
        """Return the rows of optimizer step `update`: each epoch goes through the batch in an order of its own."""
        kl_sum, num_tokens = self._moved
        if update and self.target_kl is not None and kl_sum > self.target_kl * num_tokens:
            return None  # and so for the updates that are left: nothing moves the policy any more
        self._moved = [0.0, 0.0]
        if self.minibatches == 1:
            return batch
        epoch, part = divmod(update, self.minibatches)
        size = batch.num_rows // self.minibatches
        start = (self._batch_index * self.epochs + epoch) * batch.num_rows + part * size
        rows = order(batch.num_rows, seed=self.seed, start=start, count=size)
        return batch.select(torch.as_tensor(rows, device=self.device).sort().values)

    def needed(self, batch: Batch) -> Batch:
        """Leave out the rows whose advantages are all zero, where the surrogate is the whole loss: 0 times anything.

        With a target KL all stay: how far the policy moved is measured on the whole mini-batch.
        """
        is_ours = getattr(self.surrogate, "func", self.surrogate).__module__ == surrogates.__name__
        is_more = self.reference is not None or self.head is not None or bool(self.entropy_coef_now)
        if not is_ours or is_more or self.target_kl is not None:
            return batch
        has_part = batch.values["advantages"].ne(0).any(dim=1)
        has_part[0] |= not bool(has_part.any())  # a step with no gradient at all is still a step
        return batch if bool(has_part.all()) else batch.select(has_part.nonzero()[:, 0])

    def loss(self, scorer: Scorer, batch: Batch, totals: Denominators, means: Means, *, update: int) -> Tensor:
        """Return aggregation(surrogate + kl_coef kl - entropy_coef entropy) + value_coef value loss."""
        mask, values = batch.rows.completion_mask, batch.values
        entropy_coef = self.entropy_coef_now
        scores = scorer(batch.rows, temperature=self.sampling.temperature, entropy_grad=entropy_coef != 0)
        logprobs, old_logprobs = scores.logprobs, values["old_logprobs"]
        per_token, statistics = call(
            self.surrogate, logprobs=logprobs, old_logprobs=old_logprobs, advantages=values["advantages"], mask=mask
        )
        if self.reference is not None:
            kl = self.frozen.token_kl(scores, values, mask, means)
            if self.kl.is_in_loss:
                per_token = per_token + self.kl.coef * kl
        if entropy_coef:
            per_token = per_token - entropy_coef * scores.entropy
        means.add("entropy", scores.entropy, mask)
        for name, statistic in statistics.items():
            means.add(f"{name}_mean" if name.startswith("clip_ratio/") else name, statistic, mask)
        if update == 0:
            check_sampler(logprobs, old_logprobs, mask, means, is_float32=self.is_float32)
        if self.updates_per_batch > 1:
            moved = torch.where(mask, k3(old_logprobs, logprobs.detach()), 0.0)  # the sampler's tokens: KL(old || new)
            means.add("policy/approxkl", moved, mask)
            self._moved = [self._moved[0] + float(moved.sum()), self._moved[1] + float(mask.sum())]
        total = call(
            self.aggregation, x=per_token, mask=mask, num_tokens=totals.num_tokens, num_sequences=totals.num_sequences
        )
        return total + self._value_loss(scores, values, mask, totals, means)

    def evaluate(self) -> Evaluation:
        evaluation = self.evaluator()
        if self.probe is not None:
            data = self.rollouts.data
            evaluation.metrics.update(self.probe(self.policy, self.frozen.reference, data, device=self.device))
        return evaluation

    @property
    def is_evaluated(self) -> bool:
        return holds_out(self.rollouts.data)

    def plan(self) -> list[tuple[str, str]]:
        kl = f"{self.kl.base_coef:g} x {self.kl.estimator} in the {self.kl.where}" if self.kl.base_coef else "none"
        steps = f"{self.epochs} x {self.minibatches} = {self.updates_per_batch}" if self.updates_per_batch > 1 else "1"
        return [
            *self.rollouts.plan(),
            ("optimizer steps per batch", steps),
            ("held-out prompts", self.evaluator.plan()),
            ("rewards", ", ".join(f"{weight:g} x {name}" for name, weight in self.rollouts.rewards.weights.items())),
            ("KL penalty", kl),
            *((f"data: {name}", f"{count:,}") for name, count in self.rollouts.data.counts.items()),
        ]

    def state_dict(self) -> dict:
        state = {"kl": self.kl.state_dict(), "rollouts": self.rollouts.state_dict()}
        return state | ({"advantage": self.advantage.state_dict()} if isinstance(self.advantage, Stateful) else {})

    def load_state_dict(self, state: dict) -> None:
        self.kl.load_state_dict(state["kl"])
        self.rollouts.load_state_dict(state["rollouts"])
        if isinstance(self.advantage, Stateful):
            self.advantage.load_state_dict(state["advantage"])

    def _advantages(self, sampled: Sampled, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return advantages [B, T], 0 outside the mask and in rows that no reward counts; with a critic returns too."""
        mask, rewards = sampled.rollout.rows.completion_mask, sampled.scored.total.to(self.device)
        counted = mask & ~rewards.isnan()[:, None]
        penalty = torch.zeros_like(values["old_logprobs"])
        if self.kl.is_in_reward:
            penalty = self.kl.coef * self.frozen.sampled_kl(sampled.rollout.rows, values)
        if "mask" in parameters(self.advantage):
            token_rewards = sampled.token_rewards(dtype=penalty.dtype, device=self.device) - penalty
            if self.target_logprob_coef:
                logprobs = self.frozen.target_logprobs(sampled.rollout.rows, target_ids(sampled.prompt_of_row))
                token_rewards = token_rewards + self.target_logprob_coef * logprobs
            available = {"rewards": token_rewards, "mask": counted, "values": values.get("old_values")}
        else:
            greedy = None if sampled.greedy_rewards is None else sampled.greedy_rewards.to(self.device)
            available = {"rewards": rewards - penalty.sum(dim=1), "greedy_rewards": greedy}
        try:
            made = call(self.advantage, group_size=self.group_size, **available)
        except ValueError as error:
            raise ConfigError(f"algo/advantage cannot use the rewards of this batch: {error}") from error
        advantages, returns = made if isinstance(made, tuple) else (made, None)
        advantages = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)
        if self.whiten_advantages:
            advantages = whiten(advantages, counted)
        result = {"advantages": torch.where(counted, advantages, 0.0)}
        return result if returns is None else result | {"returns": returns, "has_return": counted}

    def _value_loss(
        self, scores: Scores, values: dict[str, Tensor], mask: Tensor, totals: Denominators, means: Means
    ) -> Tensor:
        """Return value_coef times the clipped squared error, a mean over the batch's tokens; 0 without a critic."""
        if scores.values is None:
            return scores.logprobs.new_zeros(())
        has_return = values["has_return"]
        error, statistics = surrogates.value_clipped(
            scores.values, values["old_values"], values["returns"], clip=self.value_clip
        )
        means.add("loss/value", error, has_return)
        means.add("val/mean", values["old_values"], mask)
        for name, statistic in statistics.items():
            means.add(name, statistic, has_return)
        return self.value_coef * token_mean(error, has_return, num_tokens=totals.num_tokens)

    def _samples(self, sampled: Sampled, advantages: Tensor) -> list[dict]:
        rows = sample_rows(
            self.tokenizer, sampled.prompt_of_row, sampled.rollout, sampled.scored, count=self.samples_per_step
        )
        return [row | {"advantage": a} for row, a in zip(rows, advantages[:, 0].tolist(), strict=False)]
