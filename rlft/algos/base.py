"""What the trainer asks of an algorithm. The loop knows nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlft.core.batch import Batch, Denominators
from rlft.core.metrics import Means
from rlft.data.kinds import Kind
from rlft.models.heads import Head
from rlft.models.scorer import Scorer

NOT_EVALUATED = "none: nothing is held out, and the run trains without evaluation"  # a line of the plan


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]  # names begin with eval/
    samples: list[dict] = field(default_factory=list)


class Algorithm(ABC):
    """One way to turn a step number into a batch, and a batch into a loss."""

    reads: tuple[Kind, ...]  # the kinds of data sets that it can be given
    objective: tuple[str, str]  # the evaluation metric that says which checkpoint is best, and "max" or "min"
    updates_per_batch: int = 1  # optimizer steps taken on one batch
    head: Head | None = None  # what is trained beside the policy: a value function, a reward head

    @staticmethod
    def check(*, has_reference: bool, world_size: int, **settings: Any) -> None:
        """Refuse settings that make no sense together; called before anything is loaded.

        `settings` holds the algorithm's own, and `is_reference_initial`: whether the reference is the policy as the run
        begins with it.
        """

    @abstractmethod
    def collect(self, batch_index: int) -> Batch:
        """Return this rank's part of batch `batch_index`: a function of weights, `state_dict()`, seed and index."""

    @abstractmethod
    def loss(self, scorer: Scorer, batch: Batch, totals: Denominators, means: Means, *, update: int) -> Tensor:
        """Return a micro-batch's share of the loss and add its statistics to `means`.

        The shares of all micro-batches and ranks add up to the batch's loss. `update` counts the optimizer steps taken
        on this batch: at 0 the policy is the one that sampled it.
        """

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Measure the policy on held-out data, with fixed seeds."""

    @property
    def is_evaluated(self) -> bool:
        """Whether the data holds anything out to evaluate on; `evaluate` is not called where it does not."""
        return True

    @abstractmethod
    def plan(self) -> list[tuple[str, str]]:
        """Return derived sizes, as names and values, for a person to read before training."""

    def minibatch(self, batch: Batch, update: int) -> Batch | None:
        """Return what optimizer step `update` on this batch trains on; None passes the step over."""
        return batch

    def needed(self, batch: Batch) -> Batch:
        """Return the rows that have a part in the loss's gradient; denominators stay those of the whole batch."""
        return batch

    def state_dict(self) -> dict:
        """Return what changes during a run beside weights and optimizer, as JSON values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` returned."""
