"""What the trainer asks of an algorithm. The loop knows nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rlft.models.scorer import Scorer
from rlft.trainer.batch import Batch
from rlft.trainer.metrics import Means


@dataclass(frozen=True)
class Totals:
    """The denominators of a loss: counts over the whole optimizer batch, all micro-batches and ranks."""

    num_tokens: float
    num_sequences: float


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]  # names begin with eval/
    samples: list[dict] = field(default_factory=list)


class Algorithm(Protocol):
    """One way to turn a step number into a batch, and a batch into a loss."""

    objective: tuple[str, str]  # the evaluation metric that says which checkpoint is best, and "max" or "min"
    updates_per_batch: int  # optimizer steps taken on one batch

    def collect(self, batch_index: int) -> Batch:
        """Return this rank's part of batch `batch_index`: a pure function of (weights, seed, batch_index)."""

    def loss(self, scorer: Scorer, batch: Batch, totals: Totals, means: Means, *, update: int) -> Tensor:
        """Return a micro-batch's share of the loss and add its statistics to `means`.

        The shares of all micro-batches and ranks add up to the batch's loss. `update` counts the optimizer steps taken
        on this batch: at 0 the policy is the one that sampled it.
        """

    def evaluate(self) -> Evaluation:
        """Measure the policy on held-out data, with fixed seeds."""

    def plan(self) -> list[tuple[str, str]]:
        """Return what the user did not say but follows: derived sizes, data counts."""

    def state_dict(self) -> dict:
        """Return what a resumed run needs beside the weights, as JSON values."""

    def load_state_dict(self, state: dict) -> None: ...
