"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from rlft.core.errors import ConfigError, nearest
from rlft.core.settings import SCHEDULES, RootSettings


def learning_rate_of(settings: RootSettings, step: int) -> float:
    """Return the learning rate of optimizer step `step` of a run."""
    return learning_rate(
        step,
        peak=settings.learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.steps,
        final_fraction=settings.final_learning_rate_fraction,
    )


def learning_rate(
    step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int, final_fraction: float = 0.0
) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first).

    Rises linearly to `peak` over `warmup_steps` (the first step takes peak / warmup_steps), then
    stays (`constant`), or falls to `final_fraction * peak` at the last step in a line or half a cosine.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule} is not one of {', '.join(SCHEDULES)}{nearest(schedule, SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    left = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final_fraction + (1.0 - final_fraction) * left)
