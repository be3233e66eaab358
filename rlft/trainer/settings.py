"""What the training loop is told, and what changes while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlft.core.errors import ConfigError


@dataclass(frozen=True)
class TrainSettings:
    """The root settings that the loop reads; `conf/train.yaml` says what each means."""

    seed: int
    steps: int
    max_minutes: float | None
    max_tokens: int | None
    micro_batch: int | None
    micro_batch_tokens: int | None
    learning_rate: float
    final_learning_rate_fraction: float
    warmup_steps: int
    schedule: str
    max_grad_norm: float
    weight_decay: float
    betas: tuple[float, float]
    eval_every: int
    patience: int | None
    save_every: int
    keep: int
    log_every: int
    profile: bool

    def check_without_evaluation(self) -> None:
        """Raise `ConfigError` for a setting that asks for evaluations, for a run whose data holds nothing out."""
        asked = {"patience": self.patience is not None, "eval_every": self.eval_every > 0, "steps": self.steps == 0}
        for name, is_asked in asked.items():
            if is_asked:
                raise ConfigError(
                    f"{name}={getattr(self, name)} asks for an evaluation, and the data holds nothing out for one: "
                    f"give it a validation split, by data.source.validation or as one of the splits of data.source.path"
                )


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

    def ended(self, limits: TrainSettings) -> str | None:
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
