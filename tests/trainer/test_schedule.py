from __future__ import annotations

import math

import pytest

from rlft.core.errors import ConfigError
from rlft.trainer.schedule import SCHEDULES, learning_rate


def rates(schedule: str, **arguments) -> list[float]:
    total = arguments["total_steps"]
    return [learning_rate(step, peak=1.0, schedule=schedule, **arguments) for step in range(total)]


def test_constant_stays_after_a_warmup_whose_first_step_moves():
    assert rates("constant", warmup_steps=4, total_steps=7) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1], rel=1e-15)


def test_linear_falls_in_a_line_from_the_first_step_after_warmup():
    assert rates("linear", warmup_steps=2, total_steps=7) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0], abs=1e-15)


def test_linear_ends_at_its_final_fraction():
    expected = [1.0, 0.775, 0.55, 0.325, 0.1]
    assert rates("linear", warmup_steps=0, total_steps=5, final_fraction=0.1) == pytest.approx(expected, rel=1e-14)


def test_cosine_falls_by_half_a_cosine():
    # quarters of the way: (1 + cos(pi/4)) / 2 and so on
    expected = [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0]
    assert rates("cosine", warmup_steps=2, total_steps=7) == pytest.approx(expected, abs=1e-15)


def test_cosine_is_scaled_between_peak_and_final_fraction():
    assert rates("cosine", warmup_steps=0, total_steps=3, final_fraction=0.2) == pytest.approx([1, 0.6, 0.2], rel=1e-14)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 2), (0, 60), (10, 100), (97, 99)])
def test_last_step_reaches_the_final_fraction(schedule, warmup_steps, total_steps):
    rate = learning_rate(
        total_steps - 1, peak=3e-4, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps,
        final_fraction=0.1,
    )  # fmt: skip
    assert math.isclose(rate, 3e-5, rel_tol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_steps_beyond_the_last_stay_at_the_final_fraction(schedule):
    rate = learning_rate(50, peak=2.0, schedule=schedule, warmup_steps=0, total_steps=10, final_fraction=0.25)
    assert rate == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_alone_is_taken_at_the_peak(schedule):
    assert rates(schedule, warmup_steps=0, total_steps=1) == [1.0]


def test_unknown_schedule_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"schedule=cosin is not one of .*did you mean 'cosine'"):
        learning_rate(0, peak=1.0, schedule="cosin", warmup_steps=0, total_steps=1)
