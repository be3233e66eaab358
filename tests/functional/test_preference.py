from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlft.functional.preference import best_and_worst, bradley_terry, dpo, ipo, kto, kto_reference_point, orpo, simpo
from tests.functional.tensors import randoms


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PAIRS = f64(-1, -2), f64(-3, -1), f64(-2, -2), f64(-2, -2)  # margins h = (1) - (-1) = 2 and (0) - (1) = -1


def test_dpo_hand_computed() -> None:
    expected = f64(math.log1p(math.exp(-1)), math.log1p(math.exp(0.5)))
    assert_close(dpo(*PAIRS, beta=0.5), expected, rtol=1e-12, atol=0)


def test_label_smoothing_mixes_in_the_swapped_pair() -> None:
    chosen, rejected, ref_chosen, ref_rejected = PAIRS
    swapped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta=0.5)
    expected = 0.9 * dpo(*PAIRS, beta=0.5) + 0.1 * swapped
    assert_close(dpo(*PAIRS, beta=0.5, label_smoothing=0.1), expected, rtol=1e-12, atol=0)


def test_ipo_hand_computed() -> None:
    # target 1 / (2 * 0.25) = 2
    assert_close(ipo(*PAIRS, beta=0.25), f64(0, 9), rtol=1e-12, atol=0)


def test_bradley_terry_hand_computed() -> None:
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2
    chosen, rejected = f64(math.log(3), 1), f64(0, 1)
    assert_close(bradley_terry(chosen, rejected), f64(math.log(4 / 3), math.log(2)), rtol=1e-12, atol=0)
    assert_close(
        bradley_terry(chosen, rejected, f64(math.log(3), 0)), f64(math.log(2), math.log(2)), rtol=1e-12, atol=0
    )
    assert_close(bradley_terry(chosen, rejected, math.log(3))[0], f64(math.log(2))[0], rtol=1e-12, atol=0)


def test_simpo_hand_computed() -> None:
    # per token: -1 against -2, then -3 against -1; 2 (1) - 1 = 1 and 2 (-2) - 1 = -5
    chosen, rejected, lengths = f64(-2, -3), f64(-8, -4), (f64(2, 1), f64(4, 4))
    expected = f64(math.log1p(math.exp(-1)), math.log1p(math.exp(5)))
    assert_close(simpo(chosen, rejected, *lengths, beta=2.0, gamma=1.0), expected, rtol=1e-12, atol=0)


def test_orpo_hand_computed() -> None:
    # p = 1/2 against 1/4: odds 1 and 1/3, sigmoid(log 3) = 3/4; then p = 1/4 against 1/2: sigmoid(-log 3) = 1/4
    half, quarter = 3 * math.log(1 / 2), 2 * math.log(1 / 4)
    loss = orpo(f64(half, quarter), f64(quarter, half), f64(3, 2), f64(2, 3), beta=0.5)
    expected = f64(math.log(2) + 0.5 * math.log(4 / 3), math.log(4) + 0.5 * math.log(4))
    assert_close(loss, expected, rtol=1e-12, atol=0)


def test_orpo_of_a_certain_completion_is_finite_and_pushes_no_further() -> None:
    chosen = torch.zeros(2, requires_grad=True)  # p = 1: the odds are infinite
    loss = orpo(chosen, torch.tensor([0.0, -5.0]), torch.tensor([4, 4]), torch.tensor([4, 4]), beta=0.5)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert_close(chosen.grad, torch.full((2,), -0.25), rtol=1e-6, atol=0)  # only the likelihood has a gradient


def test_kto_hand_computed() -> None:
    # r - z0 = log 3 for each: 1 - sigmoid(+-log 3)
    r, desirable = f64(math.log(3) + 0.5, math.log(3) + 0.5), torch.tensor([True, False])
    losses = kto(r - 1, f64(-1, -1), desirable, f64(0.5).squeeze(), beta=1.0)
    assert_close(losses, f64(1 / 4, 3 / 4), rtol=1e-12, atol=0)
    weights = {"desirable_weight": 2.0, "undesirable_weight": 4 / 3}
    losses = kto(r - 1, f64(-1, -1), desirable, f64(0.5).squeeze(), beta=1.0, **weights)
    assert_close(losses, f64(1 / 2, 1), rtol=1e-12, atol=0)


def test_kto_is_in_the_precision_of_its_logprobs() -> None:
    losses = kto(f64(0), f64(0), torch.tensor([True]), f64(0).squeeze(), beta=1.0, desirable_weight=0.1)
    assert losses.dtype == torch.float64 and losses.item() == 0.05


def test_reference_point_is_a_mean_that_is_never_below_zero() -> None:
    assert kto_reference_point(f64(-1, -2), f64(-3, -2.5)).item() == 1.25
    assert kto_reference_point(f64(-3, -2.5), f64(-1, -2)).item() == 0.0


def test_no_gradient_flows_through_the_reference_or_its_point() -> None:
    logprobs, ref, z0 = (x.requires_grad_() for x in (f64(-1.0, -2.0), f64(-2.0, -1.0), f64(0.3).squeeze()))
    loss = kto(logprobs, ref, torch.tensor([True, False]), z0, beta=0.5).sum()
    found = torch.autograd.grad(loss, [logprobs, ref, z0], allow_unused=True)
    assert [x is None for x in found] == [False, True, True]
    sigmoid = 1 / (1 + math.exp(-0.5 * 0.7))
    assert found[0][0].item() == pytest.approx(-0.5 * sigmoid * (1 - sigmoid), rel=1e-12)


def test_best_and_worst_of_each_group() -> None:
    nan = math.nan
    rewards = f64(2, 1, 3, 3, 1, 3, 5, 5, 5, nan, 7, nan, nan, 2, 4, nan, nan, nan)
    best, worst, is_pair = best_and_worst(rewards, group_size=3)
    assert best.tolist()[:3] == [2, 3, 6] and worst.tolist()[:3] == [1, 4, 6]  # of equal rewards, the first
    assert is_pair.tolist() == [True, True, False, False, True, False]
    assert (best[4].item(), worst[4].item()) == (14, 13)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.floats(0.01, 2), smoothing=st.floats(0, 0.49))
def test_dpo_gradient_is_the_papers(seed: int, beta: float, smoothing: float) -> None:
    # d loss / d chosen = -beta (sigmoid(-beta h) - smoothing), and its opposite for rejected
    tensors = randoms(seed, 5, num=4)
    chosen, rejected = (x.requires_grad_() for x in tensors[:2])
    dpo(*tensors, beta=beta, label_smoothing=smoothing).sum().backward()
    for i in range(5):
        h = (tensors[0][i] - tensors[2][i] - tensors[1][i] + tensors[3][i]).item()
        slope = -beta * (1 / (1 + math.exp(beta * h)) - smoothing)
        assert chosen.grad[i].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
        assert rejected.grad[i].item() == pytest.approx(-slope, rel=1e-9, abs=1e-12)


def test_dpo_is_bradley_terry_on_implicit_rewards() -> None:
    chosen, rejected, ref_chosen, ref_rejected = randoms(1, 6, num=4)
    implicit = bradley_terry(0.3 * (chosen - ref_chosen), 0.3 * (rejected - ref_rejected))
    assert_close(dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3), implicit, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [dpo, ipo])
def test_gradcheck_and_a_detached_reference(loss) -> None:
    tensors = [x.requires_grad_() for x in randoms(2, 4, num=4)]
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, *tensors[2:], beta=0.2), tensors[:2])
    assert [x is None for x in torch.autograd.grad(loss(*tensors, beta=0.2).sum(), tensors, allow_unused=True)] == [
        False,
        False,
        True,
        True,
    ]


def test_far_margins_stay_finite() -> None:
    far = f64(1e4, -1e4).requires_grad_()
    loss = dpo(far, f64(0, 0), f64(0, 0), f64(0, 0), beta=1.0)
    loss.sum().backward()
    assert_close(loss, f64(0, 1e4), rtol=1e-12, atol=0)
    assert_close(far.grad, f64(0, -1), rtol=1e-12, atol=0)


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(3)
    for call, message in [
        (lambda: dpo(x, x, x, x, beta=0.0), "beta must be greater than 0"),
        (lambda: ipo(x, x, x, x, beta=-1.0), "beta must be greater than 0"),
        (lambda: dpo(x, x, x, x, beta=0.1, label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\)"),
        (lambda: dpo(x, x, x, x[:1], beta=0.1), r"pairs must all be \[B\].*\[\[3\], \[3\], \[3\], \[1\]\]"),
        (lambda: bradley_terry(x[None], x[None]), r"pairs must all be \[B\]"),
        (lambda: simpo(x, x, x + 1, x + 1, beta=2.0, gamma=-1.0), "gamma must be at least 0"),
        (lambda: simpo(x, x, x + 1, x[:1] + 1, beta=2.0, gamma=1.0), r"pairs must all be \[B\]"),
        (lambda: orpo(x, x, x + 1, x + 1, beta=0.0), "beta must be greater than 0"),
        (lambda: kto(x, x, x > 0, x[0], beta=0.1, desirable_weight=0.0), "weights must be greater than 0"),
        (lambda: kto(x, x, x[:1] > 0, x[0], beta=0.1), r"pairs must all be \[B\]"),
        (lambda: best_and_worst(x, group_size=1), "a pair needs a group_size of at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
