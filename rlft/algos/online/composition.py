"""What an online algorithm is composed of: its parts, and the settings that conf/algo/policy_gradient.yaml explains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from rlft.algos.online.kl import KLPenalty
from rlft.core.ranges import Count, CountOrZero, NonNegative, Positive, SizeOrZero
from rlft.core.settings import SettingsGroup
from rlft.models.base import CausalLM
from rlft.models.heads import Head
from rlft.rollout.sampling import Sampling


@dataclass(frozen=True)
class Drawing(SettingsGroup):
    """How a batch is drawn. `top_k`, `top_p` and `min_new_tokens` bend the sampled distribution away from the policy's.

    They are refused unless `allow_bent_sampling` is set, and then the ratio's denominator is the policy's own logprob.
    """

    resample_zero_std: CountOrZero  # draws, at most, that replace groups without spread (DAPO's dynamic sampling)
    samples_per_step: SizeOrZero  # completions written to samples.jsonl each step
    top_k: SizeOrZero
    top_p: float
    min_new_tokens: SizeOrZero
    allow_bent_sampling: bool

    @property
    def is_bent(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_new_tokens > 0

    def applied_to(self, sampling: Sampling) -> Sampling:
        return replace(sampling, top_k=self.top_k, top_p=self.top_p, min_new_tokens=self.min_new_tokens)


@dataclass(frozen=True)
class Updates(SettingsGroup):
    """How often a batch is trained on; from the second update on the ratio departs from 1."""

    epochs: Count  # passes over a rollout (GRPO's mu)
    minibatches: Count  # optimizer steps in a pass
    target_kl: NonNegative | None  # KL(sampler || policy), nats a token, above which the updates left are passed over

    @property
    def per_batch(self) -> int:
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class Shaping(SettingsGroup):
    """What becomes of rewards and advantages beside the advantage's own formula."""

    target_logprob_coef: float  # times the policy's logprob of the column `target_ids`, added to each token's reward
    whiten_advantages: bool  # to zero mean and unit variance over the batch's tokens


@dataclass(frozen=True)
class EntropyBonus(SettingsGroup):
    """A bonus for the entropy of the next-token distribution."""

    entropy_coef: float  # nats to loss units
    entropy_decay_batches: Count | None  # over so many batches it falls linearly to 0; None: it stays

    def coef(self, batch_index: int) -> float:
        """Return the coefficient for a batch."""
        decay = self.entropy_decay_batches
        return self.entropy_coef * (max(0.0, 1.0 - batch_index / decay) if decay else 1.0)


@dataclass(frozen=True)
class ValueLoss(SettingsGroup):
    """The loss of a critic, where there is one: a mean over the batch's tokens."""

    value_coef: NonNegative
    value_clip: Positive  # how far a value may move on one batch, in units of the reward


@dataclass(frozen=True)
class Composition(SettingsGroup):
    """The choices that make REINFORCE, RLOO, GRPO, PPO and their kin."""

    advantage: Callable[..., Tensor | tuple[Tensor, Tensor]]  # from rewards to advantages (advantage.py)
    surrogate: Callable[..., tuple[Tensor, dict[str, Tensor]]]  # loss of each token, and statistics
    aggregation: Callable[..., Tensor]  # from tokens to a scalar
    kl: KLPenalty  # the penalty, and what is logged as `kl`
    critic: Callable[[CausalLM], Head] | None  # makes a value head for the policy
    probe: Callable[..., dict[str, float]] | None  # what an evaluation measures beside the rewards
    drawing: Drawing
    updates: Updates
    shaping: Shaping
    entropy: EntropyBonus
    value: ValueLoss
