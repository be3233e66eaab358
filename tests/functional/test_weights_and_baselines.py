"""More advantages: ReMax, BNPO, best of n, reward-weighted regression."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta as beta_distribution

from rlft.functional.advantages import beta_normalized, greedy_baseline, group_mean, group_returns
from rlft.functional.weights import best_of_group, reward_weighted
from tests.oracles.loops import discounted_returns

NAN = math.nan


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_greedy_baseline_by_hand():
    assert greedy_baseline(f64(1, 2, NAN, 4), f64(0.5, 0.5, 1, NAN)).tolist() == [0.5, 1.5, 0, 0]
    with pytest.raises(ValueError, match="one shape"):
        greedy_baseline(f64(1, 2), f64(1))


def test_best_of_group_marks_one_of_each_group_that_has_a_spread():
    rewards = f64(1, 3, 3, 2, 2, 2, NAN, -1, -2)
    assert best_of_group(rewards, group_size=3).tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0]


def test_reward_weighted_by_hand():
    weights = reward_weighted(f64(0, 1, 5, 5), group_size=2, beta=0.5)
    high = 1 / (1 + math.exp(-2))
    assert weights.tolist() == pytest.approx([2 * (1 - high), 2 * high, 1, 1], rel=1e-14)
    assert reward_weighted(f64(0, NAN, NAN, NAN), group_size=2, beta=1.0).tolist() == [1, 0, 0, 0]


def test_reward_weights_average_to_one_and_ignore_a_baseline():
    rewards = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = reward_weighted(rewards, group_size=4, beta=0.7)
    assert weights.view(3, 4).mean(1).tolist() == pytest.approx([1, 1, 1], rel=1e-14)
    torch.testing.assert_close(reward_weighted(rewards + 300, group_size=4, beta=0.7), weights, rtol=1e-11, atol=0)


def test_group_returns_equal_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    mask = torch.arange(4)[None] < torch.tensor([4, 2, 3, 1, 1, 4])[:, None]
    returns = discounted_returns(rewards.tolist(), mask.tolist(), 0.7)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for i in range(6):
        for t in range(4):
            others = [returns[j][t] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i and mask[j, t]]
            if mask[i, t]:
                expected[i, t] = returns[i][t] - (sum(others) / len(others) if others else 0.0)
    got = group_returns(rewards, mask, group_size=3, gamma=0.7)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_beta_normalized_equals_the_papers_formula_with_scipys_density():
    groups = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]]
    p = [sum(group) / 4 for group in groups]
    mean = sum(p) / 6
    variance = sum((x - mean) ** 2 for x in p) / 5
    strength = mean * (1 - mean) / variance - 1
    a, b = mean * strength, (1 - mean) * strength
    expected = [
        (r - x) / beta_distribution.pdf(x, 1 + a / 3, 1 + b / 3) if 0 < x < 1 else 0.0
        for group, x in zip(groups, p, strict=True)
        for r in group
    ]
    got = beta_normalized(torch.tensor(groups, dtype=torch.float64).flatten(), group_size=4)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_beta_normalized_is_the_group_mean_where_no_beta_fits():
    for rewards in (f64(1, 0, 0, 1), f64(1, 0)):  # all p equal; a single group
        assert torch.equal(beta_normalized(rewards, group_size=2), group_mean(rewards, group_size=2))


@pytest.mark.parametrize(
    "part", [best_of_group, beta_normalized, lambda r, group_size: reward_weighted(r, group_size=group_size, beta=1.0)]
)
def test_a_group_of_one_is_refused(part):
    with pytest.raises(ValueError, match="group_size of at least 2"):
        part(f64(1, 0), group_size=1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rewards of 0 and 1"):
        beta_normalized(f64(0.5, 1), group_size=2)
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        reward_weighted(f64(0, 1), group_size=2, beta=0.0)
