from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlft.functional.preference import bradley_terry, dpo, ipo
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
    ]:
        with pytest.raises(ValueError, match=message):
            call()
