"""Every online algorithm: prompts -> rollout -> rewards -> advantages -> loss, as a composition of small parts.

REINFORCE, RLOO, GRPO, PPO and their kin are choices of an advantage, a surrogate, an aggregation, a KL penalty and
perhaps a critic; each choice is one callable with its formula and paper in its docstring, and the YAML files under
conf/algo/ put them together. `composition.py` says what there is to choose, `validate.py` what fits together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlft.algos.base import Algorithm, Evaluation, Run, Setup
from rlft.algos.online.advantage import TokenAdvantage, advantage_of
from rlft.algos.online.composition import Composition
from rlft.algos.online.evaluation import Evaluator
from rlft.algos.online.rollouts import Rollouts, target_ids
from rlft.algos.online.scoring import ReferenceScores, check_sampler
from rlft.algos.online.validate import aggregation_of, surrogate_of, validate
from rlft.algos.parts import Stateful
from rlft.algos.samples import Samples
from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.core.rng import order
from rlft.data.kinds import Kind
from rlft.functional import surrogates
from rlft.functional.advantages import whiten
from rlft.functional.aggregation import token_mean
from rlft.functional.kl import k3
from rlft.models.scorer import Scorer, Scores

MOVED = "policy/approxkl"  # KL(sampler || policy), nats a token, while an update is made


class PolicyGradient(Algorithm):
    """A policy-gradient algorithm over sampled completions."""

    reads = (Kind.PROMPTS, Kind.CONTEXTS)
    uses_rewards = True
    objective = ("eval/reward", "max")

    def __init__(self, run: Run, parts: Composition) -> None:
        super().__init__(run)
        self.parts, self.kl = parts, parts.kl
        self.advantage, self.surrogate = advantage_of(parts.advantage), surrogate_of(parts)
        self.aggregation = aggregation_of(parts)
        self.head = None if parts.critic is None else parts.critic(run.policy)
        self.updates_per_batch, self.group_size = parts.updates.per_batch, run.settings.group_size
        sampling = parts.drawing.applied_to(run.sampling)
        self.reference_scores = ReferenceScores(run, kl=parts.kl, head=self.head, sampling=sampling)
        self.rollouts = Rollouts(run, sampling=sampling, max_draws=max(1, parts.drawing.resample_zero_std))
        self.evaluator = Evaluator(run, sampling, has_exact_kl=self.reference_scores.has_exact)
        self.temperature = sampling.temperature
        if parts.shaping.target_logprob_coef:  # whether there is a column of targets, before anything is sampled
            target_ids(run.data.batch(0, size=1, seed=run.settings.seed))

    @staticmethod
    def uses_reference(**settings: Any) -> bool:
        return True

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        validate(settings["parts"], setup)

    def collect(self, batch_index: int) -> Batch:
        """prompts -> rollout -> rewards -> advantages, for this rank's share of the prompts."""
        needs_greedy = "greedy_rewards" in self.advantage.part.names
        samples = self.rollouts(batch_index, needs_greedy=needs_greedy)
        with self.run.clock("reference"):
            values = self.reference_scores.values(samples.rollout)
        values |= self._advantages(samples, values)
        coefs = {"kl": self.kl.coef, "entropy": self.parts.entropy.coef(batch_index)}
        metrics = Metrics()
        samples.add_rollout(metrics)
        if self.run.reference is not None:
            metrics.add("kl_coef", torch.tensor(coefs["kl"]))
            self._observe_kl(values, samples.rollout.rows.completion_mask)
        if self.rollouts.max_draws > 1:
            metrics.add("sampling/draws", torch.tensor(float(samples.num_draws)))
        shown = samples.rows(self.parts.drawing.samples_per_step)
        shown = [row | {"advantage": a} for row, a in zip(shown, values["advantages"][:, 0].tolist(), strict=False)]
        return Batch(samples.rollout.rows, values, metrics, shown, index=batch_index, coefs=coefs)

    def minibatch(self, batch: Batch, update: int, *, before: dict[str, float]) -> Batch | None:
        """Return the rows of optimizer step `update`: each epoch goes through the batch in an order of its own."""
        updates = self.parts.updates
        if updates.target_kl is not None and before.get(MOVED, 0.0) > updates.target_kl:
            return None  # and so are the updates that are left, since the policy moves no more
        if updates.minibatches == 1:
            return batch
        epoch, part = divmod(update, updates.minibatches)
        size = batch.num_rows // updates.minibatches
        start = (batch.index * updates.epochs + epoch) * batch.num_rows + part * size
        rows = order(batch.num_rows, seed=self.run.settings.seed, start=start, count=size)
        return batch.select(torch.as_tensor(rows, device=self.run.device).sort().values)

    def needed(self, batch: Batch) -> Batch:
        """Leave out rows whose advantages are all zero, where the surrogate is the whole loss: their gradient is zero.

        With a target KL all stay: how far the policy moved is measured on the whole mini-batch.
        """
        is_ours = self.surrogate.module == surrogates.__name__
        is_more = self.run.reference is not None or self.head is not None or bool(batch.coefs["entropy"])
        if not is_ours or is_more or self.parts.updates.target_kl is not None:
            return batch
        has_part = batch.values["advantages"].ne(0).any(dim=1)
        has_part[0] |= not bool(has_part.any())  # one row stays: a step without a gradient is still a step
        return batch if bool(has_part.all()) else batch.select(has_part.nonzero()[:, 0])

    def loss(
        self, scorer: Scorer, batch: Batch, denominators: Denominators, metrics: Metrics, *, update: int
    ) -> Tensor:
        """Return aggregation(surrogate + kl_coef kl - entropy_coef entropy) + value_coef value loss."""
        mask, values, coefs = batch.rows.completion_mask, batch.values, batch.coefs
        scores = scorer(batch.rows, temperature=self.temperature, entropy_grad=coefs["entropy"] != 0)
        logprobs, old_logprobs = scores.logprobs, values["old_logprobs"]
        per_token, statistics = self.surrogate(
            logprobs=logprobs, old_logprobs=old_logprobs, advantages=values["advantages"], mask=mask
        )
        if self.run.reference is not None:
            kl = self.reference_scores.token_kl(scores, values, mask, metrics)
            if self.kl.is_in_loss:
                per_token = per_token + coefs["kl"] * kl
        if coefs["entropy"]:
            per_token = per_token - coefs["entropy"] * scores.entropy
        metrics.add("entropy", scores.entropy, mask)
        for name, statistic in statistics.items():
            metrics.add(f"{name}_mean" if name.startswith("clip_ratio/") else name, statistic, mask)
        if update == 0:
            check_sampler(logprobs, old_logprobs, mask, metrics, is_float32=self.run.is_float32)
        if self.updates_per_batch > 1:
            metrics.add(MOVED, torch.where(mask, k3(old_logprobs, logprobs.detach()), 0.0), mask)
        total = self.aggregation(x=per_token, mask=mask, **vars(denominators))
        return total + self._value_loss(scores, values, mask, denominators, metrics)

    def evaluate(self) -> Evaluation:
        evaluation = self.evaluator()
        if self.parts.probe is not None:
            run = self.run
            evaluation.metrics.update(self.parts.probe(run.policy, run.reference, run.data, device=run.device))
        return evaluation

    def plan(self) -> list[tuple[str, str]]:
        kl, updates = self.kl, self.parts.updates
        steps = f"{updates.epochs} x {updates.minibatches} = {updates.per_batch}" if updates.per_batch > 1 else "1"
        return [
            *self.rollouts.plan(),
            ("optimizer steps per batch", steps),
            ("held-out prompts", self.evaluator.plan()),
            self.rollouts.rewards_plan(),
            ("KL penalty", f"{kl.base_coef:g} x {kl.estimator} in the {kl.where}" if kl.base_coef else "none"),
            *self.run.data_plan,
        ]

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Stateful]:
        found: dict[str, Stateful] = {"kl": self.kl, "rollouts": self.rollouts}
        return found | ({"advantage": self.parts.advantage} if isinstance(self.parts.advantage, Stateful) else {})

    def _advantages(self, samples: Samples, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return advantages [B, T], 0 outside the mask and in rows that no reward counts; with a critic returns too."""
        mask, rewards = samples.rollout.rows.completion_mask, samples.total.to(self.run.device)
        counted = mask & ~rewards.isnan()[:, None]
        make: Callable[..., Tensor | tuple[Tensor, Tensor]]
        if isinstance(self.advantage, TokenAdvantage):
            token_rewards, old_values = self._token_rewards(samples, values), values.get("old_values")
            make = partial(self.advantage, token_rewards, mask=counted, values=old_values)
        else:
            greedy = None if samples.greedy_rewards is None else samples.greedy_rewards.to(self.run.device)
            make = partial(self.advantage, rewards - self._penalty(samples, values).sum(1), greedy_rewards=greedy)
        try:
            made = make(group_size=self.group_size)
        except ValueError as error:
            raise ConfigError(f"algo/advantage cannot use the rewards of this batch: {error}") from error
        advantages, returns = made if isinstance(made, tuple) else (made, None)
        advantages = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)
        if self.parts.shaping.whiten_advantages:
            advantages = whiten(advantages, counted)
        result = {"advantages": torch.where(counted, advantages, 0.0)}
        return result if returns is None else result | {"returns": returns, "has_return": counted}

    def _token_rewards(self, samples: Samples, values: dict[str, Tensor]) -> Tensor:
        """Return rewards [B, T], less the KL where that is in the reward."""
        penalty = self._penalty(samples, values)
        rewards = samples.token_rewards(dtype=penalty.dtype, device=self.run.device) - penalty
        if coef := self.parts.shaping.target_logprob_coef:
            targets = target_ids(samples.prompt_of_row)
            rewards = rewards + coef * self.reference_scores.target_logprobs(samples.rollout.rows, targets)
        return rewards

    def _penalty(self, samples: Samples, values: dict[str, Tensor]) -> Tensor:
        """Return what the KL takes from each token's reward, [B, T]; 0 where it is not in the reward."""
        if not self.kl.is_in_reward:
            return torch.zeros_like(values["old_logprobs"])
        return self.kl.coef * self.reference_scores.sampled_kl(samples.rollout.rows, values)

    def _observe_kl(self, values: dict[str, Tensor], mask: Tensor) -> None:
        """Tell the controller of the KL how far this batch is from the reference."""
        log_ratio = torch.where(mask, values["old_logprobs"] - values["ref_logprobs"], 0.0).double()
        kl_completion = float(log_ratio.sum(dim=1).mean())
        self.kl.controller.observe(kl_completion=kl_completion, num_tokens=int(mask.sum()), num_completions=len(mask))

    def _value_loss(
        self, scores: Scores, values: dict[str, Tensor], mask: Tensor, denominators: Denominators, metrics: Metrics
    ) -> Tensor:
        """Return value_coef times the clipped squared error, a mean over the batch's tokens; 0 without a critic."""
        if scores.values is None:
            return scores.logprobs.new_zeros(())
        settings, has_return = self.parts.value, values["has_return"]
        error, statistics = surrogates.value_clipped(
            scores.values, values["old_values"], values["returns"], clip=settings.value_clip
        )
        metrics.add("loss/value", error, has_return)
        metrics.add("val/mean", values["old_values"], mask)
        for name, statistic in statistics.items():
            metrics.add(name, statistic, has_return)
        return settings.value_coef * token_mean(error, has_return, num_tokens=denominators.num_tokens)
