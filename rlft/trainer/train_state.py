"""What changes while a run trains, beside weights, optimizer and algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlft.core.settings import RootSettings


@dataclass
class TrainState:
    """All that changes during a run beside weights, optimizer and algorithm; saved in every checkpoint."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # completion tokens sampled, or read from a data set
    seconds: float = 0.0  # over all starts of this run
    non_finite: int = 0  # steps skipped, in all
    non_finite_in_row: int = 0
    best_step: int | None = None
    best_value: float | None = None
    evals_since_best: int = 0
    before: dict[str, float] = field(default_factory=dict)  # the evaluation of the untouched policy
    after: dict[str, float] = field(default_factory=dict)  # the latest evaluation

    def evaluated(self, metrics: dict[str, float], *, name: str, mode: str) -> None:
        """Take in an evaluation: whether metric `name` is the best so far, as the largest ("max") or smallest."""
        value, sign = metrics[name], 1.0 if mode == "max" else -1.0
        if self.best_value is None or sign * value > sign * self.best_value:
            self.best_value, self.best_step, self.evals_since_best = value, self.step, 0
        elif self.best_step != self.step:
            self.evals_since_best += 1
        self.after = metrics

    def ended(self, limits: RootSettings) -> str | None:
        """Return the first limit that is reached: steps, max_minutes, max_tokens or early_stopping; None where none."""
        if self.step >= limits.steps:
            return "steps"
        if limits.max_minutes is not None and self.seconds >= 60 * limits.max_minutes:
            return "max_minutes"
        if limits.max_tokens is not None and self.num_tokens >= limits.max_tokens:
            return "max_tokens"
        if limits.patience is not None and self.evals_since_best >= limits.patience:
            return "early_stopping"
        return None
