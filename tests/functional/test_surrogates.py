from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlft.functional.aggregation import sequence_mean, token_mean
from rlft.functional.surrogates import cispo, clipped, sapo, score_function, sequence_ratio, value_clipped
from tests.functional.tensors import holed_mask, padded, random_mask, randoms, with_garbage
from tests.oracles import loops

# each as (logprobs, old_logprobs, advantages, mask) -> (loss, statistics)
POLICY: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "score_function": lambda x, _old, a, _mask: score_function(x, a),
    "clipped": lambda x, old, a, _mask: clipped(x, old, a, clip_high=0.28),
    "dual": lambda x, old, a, _mask: clipped(x, old, a, dual_clip=1.5),
    "cispo": lambda x, old, a, _mask: cispo(x, old, a, clip_high=1.3, clip_low=0.5),
    "sequence_ratio": lambda x, old, a, mask: sequence_ratio(x, old, a, mask, clip_low=0.1, clip_high=0.2),
    "sapo": lambda x, old, a, _mask: sapo(x, old, a, tau_pos=1.0, tau_neg=1.3),
}
each_policy = pytest.mark.parametrize("name", POLICY)


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_ratios(*ratios: float) -> Tensor:
    return f64(ratios).log()


def test_score_function_hand_computed() -> None:
    loss, statistics = score_function(f64([-1, -2]), f64([3, -4]))
    assert_close(loss, f64([3, -8]), rtol=0, atol=0)
    assert statistics == {}


def test_clipped_hand_computed() -> None:
    # ratios 1.5 and 0.5 with either sign: the minimum takes the pessimistic side
    loss, statistics = clipped(log_ratios(1.5, 1.5, 0.5, 0.5, 1.1), f64([0] * 5), f64([2, -2, 2, -2, 2]))
    assert_close(loss, f64([-2.4, 3.0, -1.0, 1.6, -2.2]), rtol=1e-12, atol=0)
    assert_close(statistics["ratio"], f64([1.5, 1.5, 0.5, 0.5, 1.1]), rtol=1e-12, atol=0)
    assert statistics["clip_ratio/high"].tolist() == [[1, 0, 0, 0, 0]]
    assert statistics["clip_ratio/low"].tolist() == [[0, 0, 0, 1, 0]]
    assert statistics["clip_ratio/region"].tolist() == [[1, 0, 0, 1, 0]]


def test_clip_low_and_clip_high_are_separate() -> None:
    loss, _ = clipped(log_ratios(1.5, 0.5), f64([0, 0]), f64([1, -1]), clip_low=0.4, clip_high=0.1)
    assert_close(loss, f64([-1.1, 0.6]), rtol=1e-12, atol=0)


def test_dual_clip_bounds_negative_advantages_only() -> None:
    loss, statistics = clipped(log_ratios(4, 4, 2), f64([0] * 3), f64([-1, 1, -1]), dual_clip=3.0)
    assert_close(loss, f64([3, -1.2, 2]), rtol=1e-12, atol=0)
    assert statistics["clip_ratio/dual"].tolist() == [[1, 0, 0]]


def test_cispo_hand_computed() -> None:
    logprobs = f64([-1, -1, -1])
    old = logprobs - log_ratios(4, 0.25, 1.5)
    loss, statistics = cispo(logprobs, old, f64([2, 2, -2]), clip_high=2.0)
    assert_close(loss, f64([4, 0.5, -3]), rtol=1e-12, atol=0)
    assert statistics["clip_ratio/high"].tolist() == [[1, 0, 0]]
    loss, statistics = cispo(logprobs, old, f64([2, 2, -2]), clip_high=2.0, clip_low=0.5)
    assert_close(loss, f64([4, 1, -3]), rtol=1e-12, atol=0)
    assert statistics["clip_ratio/low"].tolist() == [[0, 1, 0]]


def test_sequence_ratio_hand_computed() -> None:
    # geometric means: sqrt(4 * 1) = 2 (clipped at 1.5), and 9 alone with A < 0 (not clipped)
    logprobs = torch.stack([log_ratios(4, 1, 100)[0], log_ratios(9, 100, 100)[0]])
    mask = f64([1, 1, 0], [1, 0, 0])
    loss, statistics = sequence_ratio(logprobs, torch.zeros(2, 3), f64(1, -1), mask, clip_low=0.5, clip_high=0.5)
    assert_close(loss, f64([-1.5, -1.5, 0], [9, 0, 0]), rtol=1e-12, atol=0)
    assert_close(statistics["ratio"][mask.bool()], f64(2, 2, 9), rtol=1e-12, atol=0)
    assert statistics["clip_ratio/high"][mask.bool()].tolist() == [1, 1, 0]


def test_value_clipped_hand_computed() -> None:
    # moved from 0 to 1 with clip 0.2: target 2 -> the clipped error (1.8^2) is larger; target 0 -> the plain (1^2) is
    loss, statistics = value_clipped(f64([1, 1, 0.1]), f64([0, 0, 0]), f64([2, 0, 2]), clip=0.2)
    assert_close(loss, f64([1.62, 0.5, 1.805]), rtol=1e-12, atol=0)
    assert statistics["val/clipfrac"].tolist() == [[1, 0, 0]]
    plain, _ = value_clipped(f64([1, 1, 0.1]), f64([0, 0, 0]), f64([2, 0, 2]), clip=math.inf)
    assert_close(plain, f64([0.5, 0.5, 1.805]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["clipped", "dual", "cispo", "value"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 2))
def test_token_losses_and_gradients_equal_a_naive_loop(name: str, seed: int, scale: float) -> None:
    x, old, advantages = (scale * t for t in randoms(seed, 3, 4, num=3))
    call, one = {
        "clipped": (
            partial(clipped, clip_low=0.1, clip_high=0.3),
            partial(loops.clipped, low=0.1, high=0.3, dual=None),
        ),
        "dual": (partial(clipped, dual_clip=2.0), partial(loops.clipped, low=0.2, high=0.2, dual=2.0)),
        "cispo": (partial(cispo, clip_high=1.5, clip_low=0.8), partial(loops.cispo, low=0.8, high=1.5)),
        "value": (partial(value_clipped, clip=0.4), partial(loops.value_clipped, clip=0.4)),
    }[name]
    x.requires_grad_()
    loss, _ = call(x, old, advantages)
    loss.sum().backward()
    for i in range(3):
        for t in range(4):
            want_loss, want_slope = one(x[i, t].item(), old[i, t].item(), advantages[i, t].item())
            assert loss[i, t].item() == pytest.approx(want_loss, rel=1e-9, abs=1e-12)
            assert x.grad[i, t].item() == pytest.approx(want_slope, rel=1e-9, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 2))
def test_sequence_ratio_equals_a_naive_loop(seed: int, scale: float) -> None:
    logprobs, old = (scale * t for t in randoms(seed, 4, 5, num=2))
    (advantages,), mask = randoms(seed + 1, 4), random_mask(seed, 4, 5)
    logprobs.requires_grad_()
    loss, _ = sequence_ratio(logprobs, old, advantages, mask, clip_low=0.1, clip_high=0.2)
    (sequence_mean(loss, mask) * 4).backward()
    for i in range(4):
        keep = mask[i]
        if not keep.any():
            assert (logprobs.grad[i] == 0).all()
            continue
        row = logprobs[i][keep].tolist(), old[i][keep].tolist()
        want_loss, want_slope = loops.sequence_ratio(*row, advantages[i].item(), 0.1, 0.2)
        assert_close(loss[i], want_loss * keep.double(), rtol=1e-9, atol=1e-12)
        assert_close(logprobs.grad[i], want_slope * keep.double(), rtol=1e-9, atol=1e-12)


@each_policy
def test_gradients_before_the_first_update_are_those_of_the_score_function(name: str) -> None:
    logprobs, advantages = randoms(1, 3, 4, num=2)
    mask = torch.ones(3, 4)
    rows = advantages[:, :1].expand(3, 4)  # one advantage per sequence: GSPO averages the gradient over its tokens
    logprobs.requires_grad_()
    loss, statistics = POLICY[name](logprobs, logprobs.detach(), rows, mask)
    gradient = torch.autograd.grad(loss.sum(), logprobs)[0]
    assert_close(gradient, -rows, rtol=1e-12, atol=1e-14)
    if statistics:
        assert_close(statistics["ratio"], torch.ones(3, 4).double(), rtol=0, atol=0)
        assert not any(statistics[key].any() for key in statistics if key.startswith("clip_ratio"))


@each_policy
def test_gradcheck(name: str) -> None:
    logprobs, old, advantages = randoms(2, 3, 4, num=3)
    if name == "cispo":  # autograd takes the weight as a constant, so it is constant here: at the bound everywhere
        old = logprobs - 3
    mask = random_mask(2, 3, 4)
    assert torch.autograd.gradcheck(lambda x: POLICY[name](x, old, advantages, mask)[0], (logprobs.requires_grad_(),))


def test_value_gradcheck() -> None:
    values, old, returns = randoms(3, 3, 4, num=3)
    call = lambda x: value_clipped(x, old, returns, clip=0.3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, (values.requires_grad_(),))


@each_policy
def test_only_logprobs_receive_a_gradient_and_statistics_are_detached(name: str) -> None:
    tensors = [x.requires_grad_() for x in randoms(4, 3, 4, num=3)]
    loss, statistics = POLICY[name](*tensors, torch.ones(3, 4))
    loss.sum().backward()
    assert [x.grad is not None for x in tensors] == [True, False, False]
    assert not any(x.requires_grad for x in statistics.values())
    assert {x.shape for x in statistics.values()} <= {(3, 4)}


@each_policy
def test_one_advantage_a_completion_may_be_given_as_a_vector(name: str) -> None:
    (logprobs, old), (advantages,) = randoms(5, 3, 3, num=2), randoms(6, 3)  # square: wrong broadcasting would fit
    mask = torch.ones(3, 3)
    want = POLICY[name](logprobs, old, advantages[:, None].repeat(1, 3), mask)
    for shaped in (advantages, advantages[:, None]):
        assert_close(POLICY[name](logprobs, old, shaped, mask), want, rtol=0, atol=0)


@each_policy
@pytest.mark.parametrize("dirty", [(0,), (1,), (2,), (0, 1, 2)], ids=["logprobs", "old_logprobs", "advantages", "all"])
@pytest.mark.parametrize("aggregate", [token_mean, sequence_mean])
def test_garbage_at_masked_positions_leaks_into_no_loss_gradient_or_statistic(
    name: str, dirty: tuple[int, ...], aggregate: Callable[[Tensor, Tensor], Tensor]
) -> None:
    mask = holed_mask(7, 4, 5)
    clean = randoms(7, 4, 5, num=3)
    garbage = [with_garbage(x, mask) if n in dirty else x.clone() for n, x in enumerate(clean)]
    results = []
    for tensors in (clean, garbage):
        logprobs = tensors[0].requires_grad_()
        loss, statistics = POLICY[name](*tensors, mask)
        aggregate(loss, mask).backward()
        masked = {key: token_mean(x, mask) for key, x in statistics.items()}
        results.append((aggregate(loss, mask), logprobs.grad, masked))
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert (results[1][1][~mask] == 0).all()


def test_value_garbage_at_masked_positions_does_not_leak() -> None:
    mask = holed_mask(8, 4, 5)
    clean, grads = randoms(8, 4, 5, num=3), []
    for tensors in (clean, [with_garbage(x, mask) for x in clean]):
        values = tensors[0].clone().requires_grad_()
        token_mean(value_clipped(values, *tensors[1:], clip=0.2)[0], mask).backward()
        grads.append(values.grad)
    assert_close(grads[1], grads[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["score_function", "clipped", "dual", "cispo", "sequence_ratio"])
@pytest.mark.parametrize("which", [0, 2], ids=["logprobs", "advantages"])
def test_a_counted_nan_makes_the_loss_nan(name: str, which: int) -> None:
    tensors = randoms(9, 2, 3, num=3)
    tensors[which][0, 0] = torch.nan
    mask = torch.ones(2, 3)
    assert token_mean(POLICY[name](*tensors, mask)[0], mask).isnan()


@each_policy
def test_padding_changes_nothing(name: str) -> None:
    tensors, mask = randoms(10, 4, 5, num=3), random_mask(10, 4, 5)
    longer = [padded(x, 3) for x in tensors]
    long_mask = padded(mask.double(), 3, 0.0)
    loss, long_loss = POLICY[name](*tensors, mask)[0], POLICY[name](*longer, long_mask)[0]
    assert_close(token_mean(long_loss, long_mask), token_mean(loss, mask), rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.floats(0, 1), high=st.floats(0, 5), dual=st.floats(1.01, 10))
def test_clipping_only_ever_lowers_the_gain_and_dual_clip_only_raises_it(
    seed: int, low: float, high: float, dual: float
) -> None:
    logprobs, old, advantages = randoms(seed, 3, 4, num=3)
    plain = -(logprobs - old).exp() * advantages
    loss, statistics = clipped(logprobs, old, advantages, clip_low=low, clip_high=high)
    dual_loss, _ = clipped(logprobs, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    assert (loss >= plain - 1e-12).all()
    assert (dual_loss <= loss + 1e-12).all()
    kept = statistics["clip_ratio/region"] == 0
    assert_close(loss[kept], plain[kept], rtol=1e-12, atol=1e-14)


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(2, 3)
    for call, message in [
        (lambda: clipped(x, x, x, clip_low=1.2), "clip_low must be between 0 and 1"),
        (lambda: clipped(x, x, x, clip_high=-0.1), "clip_high must be at least 0"),
        (lambda: clipped(x, x, x, dual_clip=1.0), "dual_clip must be greater than 1"),
        (lambda: sequence_ratio(x, x, x, x, clip_low=math.nan, clip_high=0.1), "clip_low must be between 0 and 1"),
        (lambda: cispo(x, x, x, clip_high=0.0), "clip_high is CISPO's bound"),
        (lambda: cispo(x, x, x, clip_high=2.0, clip_low=3.0), "clip_low is CISPO's lower bound"),
        (lambda: value_clipped(x, x, x, clip=0.0), "clip must be greater than 0"),
        (lambda: value_clipped(x, x, x[:, 0], clip=0.2), "must have one shape"),
        (lambda: clipped(x, x[0], x), "must have one shape"),
        (lambda: sequence_ratio(x, x[0], x, x, clip_low=0.1, clip_high=0.1), "must have one shape"),
        (lambda: sequence_ratio(x, x, x, x[0], clip_low=0.1, clip_high=0.1), "mask must have the shape"),
        (lambda: score_function(x, x[0]), r"advantages \[B, T\], \[B, 1\] or \[B\], got \[2, 3\] and \[3\]"),
        (lambda: score_function(x[0], x[0]), r"logprobs must be \[B, T\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
