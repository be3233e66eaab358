from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlft.functional.advantages import discounted_returns, gae, group_mean, group_zscore, leave_one_out, whiten
from rlft.functional.surrogates import score_function
from tests.functional.tensors import holed_mask, padded, random_mask, randoms, with_garbage
from tests.oracles import enumeration, loops

GROUPED: dict[str, Callable[..., Tensor]] = {
    "mean": group_mean,
    "zscore": group_zscore,
    "leave_one_out": leave_one_out,
}
each_grouped = pytest.mark.parametrize("kind", GROUPED)
fractions = st.floats(0, 1)


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gae_hand_computed() -> None:
    # gamma 1/2, lam 1/2; deltas: 1 + .5*4 - 2 = 1;  0 + .5*8 - 4 = 0;  6 - 8 = -2;  A = d + A'/4
    advantages, returns = gae(f64([1, 0, 6, 9]), f64([2, 4, 8, 9]), f64([1, 1, 1, 0]), gamma=0.5, lam=0.5)
    assert_close(advantages, f64([1 - 0.125, -0.5, -2, 0]), rtol=0, atol=0)
    assert_close(returns, f64([2.875, 3.5, 6, 0]), rtol=0, atol=0)


def test_discounted_returns_hand_computed() -> None:
    assert_close(discounted_returns(f64([1, 2, 4, 9]), f64([1, 1, 1, 0]), gamma=0.5), f64([3, 4, 4, 0]), rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), times=st.integers(0, 7), gamma=fractions, lam=fractions)
def test_gae_and_returns_equal_the_definitions_sums(seed: int, rows: int, times: int, gamma: float, lam: float) -> None:
    rewards, values = randoms(seed, rows, times, num=2)
    mask = holed_mask(seed, rows, times) if times else torch.zeros(rows, 0, dtype=torch.bool)
    expected = loops.gae(rewards.tolist(), values.tolist(), mask.tolist(), gamma, lam)
    for got, want in zip(gae(rewards, values, mask, gamma=gamma, lam=lam), expected, strict=True):
        assert_close(got, f64(*want).reshape(rows, times), rtol=1e-9, atol=1e-12)
    want_returns = f64(*loops.discounted_returns(rewards.tolist(), mask.tolist(), gamma)).reshape(rows, times)
    assert_close(discounted_returns(rewards, mask, gamma=gamma), want_returns, rtol=1e-9, atol=1e-12)


def test_gae_with_lam_zero_is_the_temporal_difference_and_with_lam_one_returns_minus_values() -> None:
    rewards, values = randoms(0, 2, 4, num=2)
    mask = torch.ones(2, 4)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1)], 1)
    one_step, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    assert_close(one_step, rewards + 0.9 * following - values, rtol=1e-12, atol=1e-12)
    whole, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    assert_close(returns, discounted_returns(rewards, mask, gamma=0.9), rtol=1e-12, atol=1e-12)
    assert_close(whole, returns - values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make_mask", [random_mask, holed_mask])
def test_garbage_and_padding_change_no_advantage(make_mask: Callable[[int, int, int], Tensor]) -> None:
    rewards, values = randoms(1, 4, 6, num=2)
    mask = make_mask(1, 4, 6)
    calls = {
        "gae": lambda r, v, m: gae(r, v, m, gamma=0.9, lam=0.8)[0],
        "targets": lambda r, v, m: gae(r, v, m, gamma=0.9, lam=0.8)[1],
        "returns": lambda r, _, m: discounted_returns(r, m, gamma=0.9),
        "whiten": lambda r, _, m: whiten(r, m),
        "whiten_scale": lambda r, _, m: whiten(r, m, shift_mean=False),
    }
    for name, call in calls.items():
        clean = call(rewards, values, mask)
        assert (clean[~mask] == 0).all(), name
        assert_close(
            call(with_garbage(rewards, mask), with_garbage(values, mask), mask.double()), clean, rtol=0, atol=0
        )
        longer = call(padded(rewards, 3), padded(values, 3), padded(mask.double(), 3, 0.0))
        assert_close(longer, padded(clean, 3, 0.0), rtol=1e-12, atol=1e-15)


def test_garbage_leaks_into_no_gradient() -> None:
    mask = holed_mask(2, 3, 5)
    rewards, values = (with_garbage(x, mask).requires_grad_() for x in randoms(2, 3, 5, num=2))
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    (advantages.square().sum() + whiten(rewards, mask).pow(3).sum()).backward()
    for x in (rewards, values):
        assert x.grad.isfinite().all()
        assert (x.grad[~mask] == 0).all()
        assert (x.grad[mask] != 0).any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", [-1.0, 0.0, 1.0, -2.0, 1.0, 1.0]),
        ("zscore", [-1 / 1.0001, 0.0, 1 / 1.0001, -2 / (3**0.5 + 1e-4), 1 / (3**0.5 + 1e-4), 1 / (3**0.5 + 1e-4)]),
        ("leave_one_out", [-1.5, 0.0, 1.5, -3.0, 1.5, 1.5]),
    ],
)
def test_group_advantages_hand_computed(kind: str, expected: list[float]) -> None:
    assert_close(GROUPED[kind](f64(1, 2, 3, 4, 7, 7), group_size=3), f64(*expected), rtol=1e-12, atol=1e-12)


@each_grouped
@settings(max_examples=40, deadline=None)
@given(data=st.data(), groups=st.integers(1, 4), group_size=st.integers(2, 5))
def test_group_advantages_equal_a_naive_loop_with_uncounted_rewards(
    kind: str, data: st.DataObject, groups: int, group_size: int
) -> None:
    reward = st.one_of(st.just(math.nan), st.integers(-8, 8).map(float), st.floats(-10, 10).map(lambda x: round(x, 3)))
    rewards = data.draw(st.lists(reward, min_size=groups * group_size, max_size=groups * group_size))
    expected = f64(*loops.group_advantages(rewards, group_size, kind))
    assert_close(GROUPED[kind](f64(*rewards), group_size=group_size), expected, rtol=1e-8, atol=1e-9)


@each_grouped
def test_an_uncounted_reward_changes_nothing_for_the_others(kind: str) -> None:
    three = GROUPED[kind](f64(1, 5, 3), group_size=3)
    four = GROUPED[kind](f64(1, math.nan, 5, 3), group_size=4)
    assert_close(four, f64(three[0], 0, three[1], three[2]), rtol=1e-12, atol=0)
    assert (GROUPED[kind](f64(math.nan, 7, math.nan, math.nan), group_size=2) == 0).all()


@each_grouped
@pytest.mark.parametrize("value", [0.1, -7.3, 1e6])
def test_a_group_of_equal_rewards_has_an_advantage_of_exactly_zero(kind: str, value: float) -> None:
    assert (GROUPED[kind](torch.full((14,), value), group_size=7) == 0).all()


@each_grouped
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-100, 100))
def test_group_advantages_sum_to_zero_and_ignore_a_constant(kind: str, seed: int, shift: float) -> None:
    (rewards,) = randoms(seed, 12)
    advantages = GROUPED[kind](rewards, group_size=4)
    assert_close(advantages.reshape(3, 4).sum(1), torch.zeros(3).double(), rtol=0, atol=1e-9)
    assert_close(GROUPED[kind](rewards + shift, group_size=4), advantages, rtol=1e-8, atol=1e-9)


def test_integer_rewards_are_taken() -> None:
    assert_close(group_mean(torch.tensor([0, 1]), group_size=2), torch.tensor([-0.5, 0.5]))


def test_groups_that_make_no_sense_are_refused() -> None:
    for function in (group_zscore, leave_one_out):
        with pytest.raises(ValueError, match=f"{function.__name__} .*at least 2, got 1"):
            function(f64(1, 2), group_size=1)
    assert (group_mean(f64(1, 2), group_size=1) == 0).all()
    for function in GROUPED.values():
        with pytest.raises(ValueError, match="5 rewards do not make whole groups of 2"):
            function(f64(1, 2, 3, 4, 5), group_size=2)
        with pytest.raises(ValueError, match=r"rewards must be \[B\].*\[2, 2\]"):
            function(f64([1, 2], [3, 4]), group_size=2)


@pytest.mark.parametrize(("gamma", "lam", "name"), [(1.1, 0.5, "gamma"), (0.5, -0.1, "lam"), (math.nan, 0.5, "gamma")])
def test_a_discount_outside_zero_to_one_is_refused(gamma: float, lam: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1"):
        gae(f64([1]), f64([1]), f64([1]), gamma=gamma, lam=lam)


def expected_gradient(advantage: Callable[..., Tensor], group_size: int) -> tuple[Tensor, Tensor]:
    """The expectation, over every group of 2-token sequences, of the gradient of the mean loss; and -grad E[r]."""
    (table,) = randoms(7, enumeration.num_contexts(2, 2), 2)
    table.requires_grad_()
    ids = enumeration.sequences(2, 2)
    rewards = f64(0.3, -1.0, 2.0, 0.5)  # one for each of the 4 sequences
    logprobs = enumeration.token_logprobs(table, ids)
    exact = torch.autograd.grad(-(logprobs.sum(1).exp() * rewards).sum(), table, retain_graph=True)[0]
    total = torch.zeros(())
    for group in torch.cartesian_prod(*[torch.arange(4)] * group_size):
        loss, _ = score_function(logprobs[group], advantage(rewards[group], group_size=group_size))
        total = total + logprobs[group].sum().exp().detach() * loss.sum(1).mean()
    return torch.autograd.grad(total, table)[0], exact


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_has_the_exact_expected_gradient(group_size: int) -> None:
    gradient, exact = expected_gradient(leave_one_out, group_size)
    assert exact.abs().max() > 0.01
    assert_close(gradient, exact, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("group_size", [2, 3])
def test_group_mean_has_k_minus_one_over_k_of_leave_one_outs_expected_gradient(group_size: int) -> None:
    gradient, exact = expected_gradient(group_mean, group_size)
    assert_close(gradient, exact * (group_size - 1) / group_size, rtol=1e-9, atol=1e-14)


def test_group_zscore_has_an_expected_gradient_of_another_direction() -> None:
    gradient, exact = expected_gradient(group_zscore, 3)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
    assert 0.5 < cosine < 0.999


def test_whiten_keeps_the_published_constants() -> None:
    x = torch.arange(12, 21).double()[None] / 10
    kept = whiten(x, torch.ones(1, 9), shift_mean=False)
    shifted = whiten(x, torch.ones(1, 9))
    assert kept[0, 0].item() == pytest.approx(0.1394, abs=5e-5)
    assert kept[0, 0].item() == pytest.approx(1.6 - 0.4 / math.sqrt(0.075 + 1e-8), rel=1e-12)
    assert_close(shifted, kept - 1.6, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), shift_mean=st.booleans())
def test_whiten_equals_a_naive_loop_and_has_unit_variance(seed: int, shift_mean: bool) -> None:
    (x,), mask = randoms(seed, 4, 5), holed_mask(seed, 4, 5)
    got = whiten(x, mask, shift_mean=shift_mean)
    assert_close(got, f64(*loops.whiten(x.tolist(), mask.tolist(), shift_mean)), rtol=1e-9, atol=1e-9)
    if mask.sum() > 5:
        assert got[mask].var().item() == pytest.approx(1.0, rel=1e-5)  # eps 1e-8 in the variance


@pytest.mark.parametrize("num", [0, 1])
def test_whiten_of_at_most_one_entry_is_finite(num: int) -> None:
    mask = torch.arange(3)[None] < num
    assert_close(whiten(f64([5, 6, 7]), mask), f64([0, 0, 0]), rtol=0, atol=0)
    assert_close(whiten(f64([5, 6, 7]), mask, shift_mean=False), f64([5.0 * num, 0, 0]), rtol=0, atol=0)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="rewards and values must have one shape"):
        gae(torch.zeros(3, 3), torch.zeros(3), torch.ones(3, 3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="mask must have the shape"):
        whiten(torch.zeros(3, 3), torch.ones(3))
