"""What a run hands to an algorithm, and what the trainer asks of one. The loop knows nothing else of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Clock, Metrics
from rlft.core.settings import RootSettings
from rlft.data.kinds import Kind
from rlft.data.source import holds_out
from rlft.models.base import CausalLM
from rlft.models.heads import Head
from rlft.models.scorer import Scorer
from rlft.rewards.compose import RewardSum
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer

CPU = torch.device("cpu")
NOT_EVALUATED = "none: nothing is held out, and the run trains without evaluation"  # a line of the plan


@dataclass(frozen=True)
class Setup:
    """What is known of a run before anything is loaded."""

    settings: RootSettings
    has_reference: bool
    is_reference_initial: bool = False  # whether the reference is the policy as the run begins with it
    world_size: int = 1


@dataclass(frozen=True)
class Run:
    """What a run hands to everyone who takes part in it."""

    settings: RootSettings
    policy: CausalLM
    tokenizer: Tokenizer
    data: Any  # a data set of one of the kinds that the algorithm reads
    reference: CausalLM | None = None
    rewards: RewardSum | None = None
    device: torch.device = CPU
    autocast: Callable[[], AbstractContextManager] = nullcontext  # the context of a forward, for mixed precision
    is_float32: bool = True  # whether logprobs are exact to float32's rounding
    rank: int = 0
    world_size: int = 1
    clock: Clock = field(default_factory=Clock)

    @property
    def sampling(self) -> Sampling:
        """How the root settings have completions drawn."""
        s = self.settings
        return Sampling(max_new_tokens=s.max_new_tokens, temperature=s.temperature, max_rows=s.rollout_rows)

    @property
    def data_plan(self) -> list[tuple[str, str]]:
        """Return what the data set counted, as lines of the plan."""
        return [(f"data: {name}", f"{count:,}") for name, count in self.data.counts.items()]


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]  # names begin with eval/
    samples: list[dict] = field(default_factory=list)


class Algorithm(ABC):
    """One way to turn a step number into a batch, and a batch into a loss."""

    reads: ClassVar[tuple[Kind, ...]]  # the kinds of data sets that it can be given
    uses_rewards: ClassVar[bool] = False  # whether `Run.rewards` are made for it
    objective: ClassVar[tuple[str, str]]  # the evaluation metric that says which checkpoint is best, and "max" or "min"
    updates_per_batch: int = 1  # optimizer steps taken on one batch
    head: Head | None = None  # what is trained beside the policy: a value function, a reward head

    def __init__(self, run: Run) -> None:
        self.run = run

    @staticmethod
    def uses_reference(**settings: Any) -> bool:
        """Whether `Run.reference` is made for an algorithm with these settings: it may be a copy of the policy."""
        return False

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        """Refuse settings that make no sense together; rlft/build.py calls it before anything is loaded.

        `settings` are the arguments of the constructor beside the run. Raises `ConfigError`.
        """

    @abstractmethod
    def collect(self, batch_index: int) -> Batch:
        """Return this rank's part of batch `batch_index`: a function of weights, `state_dict()`, seed and index."""

    @abstractmethod
    def loss(
        self, scorer: Scorer, batch: Batch, denominators: Denominators, metrics: Metrics, *, update: int
    ) -> Tensor:
        """Return a micro-batch's share of the loss and add its statistics to `metrics`.

        The shares of all micro-batches and ranks add up to the batch's loss. `update` counts the optimizer steps taken
        on this batch: at 0 the policy is the one that sampled it.
        """

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Measure the policy on held-out data, with fixed seeds."""

    @property
    def is_evaluated(self) -> bool:
        """Whether the data holds anything out to evaluate on; `evaluate` is not called where it does not."""
        return holds_out(self.run.data)

    @abstractmethod
    def plan(self) -> list[tuple[str, str]]:
        """Return derived sizes, as names and values, for a person to read before training."""

    def minibatch(self, batch: Batch, update: int, *, before: dict[str, float]) -> Batch | None:
        """Return what optimizer step `update` on this batch trains on; None passes the step over.

        `before` holds the metrics of the last update on the same batch; it is empty at the first.
        """
        return batch

    def needed(self, batch: Batch) -> Batch:
        """Return the rows that contribute to the gradient; the denominators stay those of the whole batch."""
        return batch

    def state_dict(self) -> dict:
        """Return what changes during a run beside weights and optimizer, as JSON values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` returned."""


def check_shared(setting: str, size: int, setup: Setup) -> None:
    """Raise `ConfigError` for a batch that the processes cannot share evenly."""
    if size % setup.world_size:
        raise ConfigError(f"{setting}={size} must be a multiple of the {setup.world_size} processes")
