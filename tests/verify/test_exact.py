"""Closed forms: constants computed by hand, bounds, and the exact gradient by differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlft import build
from rlft.verify import exact, fixed_points
from rlft.verify.enumerable import endings, parity, token_count
from rlft.verify.formulas import Formula
from rlft.verify.token_weights import OF_A_GROUP, of_groups

HALF = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
REWARDS = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def test_optimum_of_a_coin_by_hand():
    best = exact.optimum(HALF, REWARDS, beta=1.0)
    p = math.e / (math.e + 1)
    assert best.logp.exp().tolist() == [pytest.approx([p, 1 - p], rel=1e-14)]
    assert best.objective == pytest.approx(math.log((math.e + 1) / 2), rel=1e-14)
    assert best.reward == pytest.approx(p, rel=1e-14)
    assert best.kl == pytest.approx(math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p), rel=1e-13)


def test_kl_and_objective_by_hand():
    logp = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(exact.kl(logp, HALF)) == pytest.approx(kl, rel=1e-14)
    assert float(exact.objective(logp, HALF, REWARDS, beta=0.4)) == pytest.approx(0.25 - 0.4 * kl, rel=1e-14)
    both = (torch.cat([logp, HALF]), torch.cat([HALF, HALF]))
    assert float(exact.kl(*both)) == pytest.approx(kl / 2, rel=1e-14)  # the mean over prompts


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_no_policy_is_above_the_frontier_and_the_optimum_is_on_it(beta):
    task = endings(((0,), (1,)), 3, 3)
    ref_logp = exact.logprobs(task.policy(seed=0, spread=1.0), task).detach()
    best = exact.optimum(ref_logp, task.rewards, beta=beta)
    reward, slope = exact.attainable(ref_logp, task.rewards, best.kl)
    assert (reward, slope) == (pytest.approx(best.reward, rel=1e-9), pytest.approx(beta, rel=1e-6))
    for seed in range(1, 6):
        logp = exact.logprobs(task.policy(seed=seed, spread=2.0), task).detach()
        most, _ = exact.attainable(ref_logp, task.rewards, float(exact.kl(logp, ref_logp)))
        assert float(exact.expected_reward(logp, task.rewards)) < most
    assert exact.attainable(ref_logp, task.rewards, 0.0)[0] == pytest.approx(
        float(exact.expected_reward(ref_logp, task.rewards)), abs=1e-3
    )


def test_the_frontier_rises_and_bends_down():
    task = token_count()
    ref_logp = exact.logprobs(task.policy(seed=0, spread=0.0), task).detach()
    curve = np.array(exact.frontier(ref_logp, task.rewards, max_kl=2.0))
    kl, reward = curve.T
    slopes = np.diff(reward) / np.diff(kl)
    assert curve[0].tolist() == [0.0, pytest.approx(4 / 3)]
    assert kl[-2] <= 2.0 < kl[-1] and (np.diff(kl) > 0).all() and (slopes > 0).all() and (np.diff(slopes) < 0).all()


def test_exact_gradient_equals_differences():
    task = endings(((0,),), 2, 3)
    policy, reference = task.policy(seed=1, spread=1.0), task.policy(seed=2, spread=1.0)

    def value() -> torch.Tensor:
        ref_logp = exact.logprobs(reference, task, temperature=0.8).detach()
        return exact.objective(exact.logprobs(policy, task, temperature=0.8), ref_logp, task.rewards, beta=0.3)

    (gradient,) = torch.autograd.grad(value(), policy.table)
    with torch.no_grad():
        for place in np.ndindex(*policy.table.shape):
            steps = []
            for sign in (1, -1):
                policy.table[place] += sign * 1e-6
                steps.append(float(value()))
                policy.table[place] -= sign * 1e-6
            assert float(gradient[place]) == pytest.approx((steps[0] - steps[1]) / 2e-6, abs=1e-8)  # of differences


@pytest.mark.parametrize(("advantage", "kl"), [("leave_one_out", "k2"), ("zscore", "k3"), ("softmax", "k3")])
def test_the_weights_of_a_fixed_point_are_the_mean_over_all_groups(advantage, kl):
    settings = {"advantage": {"eps": 1e-4, "beta": 0.7}, "kl": {"coef": 0.5}}
    values, chances = [0.0, 0.5, 2.0], torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    made = fixed_points.Weights(Formula(advantage, "score", "sequence_sum", kl), settings, values, 3)
    wanted = []
    for v in values:
        total = 0.0
        for i, a in enumerate(values):
            for j, b in enumerate(values):
                total += float(chances[i] * chances[j]) * OF_A_GROUP[advantage]([v, a, b], settings["advantage"])[0]
        wanted.append(total)
    assert made.expected(chances).tolist() == pytest.approx(wanted, rel=1e-12)


def test_the_fixed_point_of_dr_grpo_with_the_forward_kl_is_the_optimum_at_a_larger_beta():
    """Its expected gradient is (k - 1) / k of the reward's, and with one token nothing else tells the two apart."""
    task = token_count(3, 1)
    policy, reference = (task.policy(seed=0, spread=0.0) for _ in range(2))
    node = build.algorithm_node("dr_grpo", ("algo/kl=exact", "algo.kl.coef=0.6"), max_new_tokens=1)
    formula = Formula("mean", "clipped", "constant", "exact")
    fixed_points.climb(formula, node, task, policy, reference, group_size=4)
    best = exact.optimum(exact.logprobs(reference, task).detach(), task.rewards, beta=0.6 * 4 / 3)
    torch.testing.assert_close(exact.logprobs(policy, task).detach(), best.logp, rtol=0, atol=1e-6)  # where Adam stops


def test_bnpos_weights_tend_to_those_of_many_groups():
    settings = {"advantage": {}, "kl": {"coef": 0.5}}
    task, size = parity(3, 2), 3
    made = fixed_points.Weights(Formula("beta", "clipped", "token_mean", "k3"), settings, [0.0, 1.0], size)
    chances = torch.tensor([0.4, 0.6], dtype=torch.float64)
    generator = np.random.default_rng(0)
    rewards = (generator.random((40_000, size)) < 0.6).astype(float)
    weights = np.array(of_groups("beta", rewards.tolist(), [], {}))
    for value, expected in zip((0.0, 1.0), made.expected(chances).tolist(), strict=True):
        assert weights[rewards.ravel() == value].mean() == pytest.approx(expected, abs=0.01)  # of 40,000 groups
    assert task.rewards.unique().tolist() == [0.0, 1.0]
