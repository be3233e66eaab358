from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlft.functional.aggregation import token_mean
from rlft.functional.kl import exact, k1, k2, k3
from tests.functional.tensors import random_mask, randoms, with_garbage
from tests.oracles import enumeration, loops

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k1", [math.log(2), -math.log(4)]),
        ("k2", [0.240226506959, 0.960906027836]),
        ("k3", [0.193147180560, 1.613705638880]),
    ],
)
def test_hand_computed_values(name: str, expected: list[float]) -> None:
    # p / q = 2 and 1/4: k3 = q/p - 1 + log(p/q) = 1/2 - 1 + log 2 and 4 - 1 - log 4
    logprobs = torch.tensor([[math.log(0.5), math.log(0.2)]], dtype=torch.float64)
    ref_logprobs = torch.tensor([[math.log(0.25), math.log(0.8)]], dtype=torch.float64)
    assert_close(
        ESTIMATORS[name](logprobs, ref_logprobs), torch.tensor([expected], dtype=torch.float64), rtol=1e-9, atol=0
    )


def enumerated(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tables of a policy (with gradient) and a reference, and every sequence of 3 tokens of that length."""
    contexts = enumeration.num_contexts(3, length)
    table, ref_table = randoms(1, contexts, 3, num=2)
    return table.requires_grad_(), ref_table.requires_grad_(), enumeration.sequences(3, length)


def exact_sequence_kl(table: torch.Tensor, ref_table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """sum_y pi(y) (log pi(y) - log ref(y)), differentiable with respect to both."""
    logp, logq = (enumeration.token_logprobs(x, ids).sum(1) for x in (table, ref_table))
    return (logp.exp() * (logp - logq)).sum()


def expectation(name: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E_pi of a sequence's estimate and of its gradient: the probabilities are constants."""
    table, ref_table, ids = enumerated(length)
    logp, logq = (enumeration.token_logprobs(x, ids).sum(1) for x in (table, ref_table))
    value = (logp.exp().detach() * ESTIMATORS[name](logp, logq)).sum()
    return value.detach(), torch.autograd.grad(value, table)[0]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_expected_value_of_k1_and_k3_is_the_exact_kl(name: str, length: int) -> None:
    assert_close(expectation(name, length)[0], exact_sequence_kl(*enumerated(length)).detach(), rtol=1e-10, atol=0)


def test_expected_value_of_k2_is_not_the_exact_kl() -> None:
    assert abs(expectation("k2", 3)[0] / exact_sequence_kl(*enumerated(3)).detach() - 1) > 0.05


@pytest.mark.parametrize("length", [1, 3])
def test_expected_gradients_are_those_of_the_table(length: int) -> None:
    table, ref_table, ids = enumerated(length)
    forward = torch.autograd.grad(exact_sequence_kl(table, ref_table, ids), table)[0]
    backward = torch.autograd.grad(exact_sequence_kl(ref_table, table, ids), table)[0]
    assert forward.abs().max() > 0.01
    assert_close(expectation("k1", length)[1], torch.zeros_like(forward), rtol=0, atol=1e-14)
    assert_close(expectation("k2", length)[1], forward, rtol=1e-10, atol=1e-14)
    assert_close(expectation("k3", length)[1], backward, rtol=1e-10, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 30))
def test_k2_and_k3_are_never_negative_and_zero_for_equal_policies(seed: int, scale: float) -> None:
    logprobs, ref_logprobs = (scale * x for x in randoms(seed, 3, 4, num=2))
    for estimator in (k2, k3):
        assert (estimator(logprobs, ref_logprobs) >= 0).all()
        assert (estimator(logprobs, logprobs) == 0).all()


@each_estimator
def test_gradcheck_and_a_detached_reference(name: str) -> None:
    logprobs, ref_logprobs = (x.requires_grad_() for x in randoms(3, 2, 3, num=2))
    assert torch.autograd.gradcheck(lambda x: ESTIMATORS[name](x, ref_logprobs.detach()), (logprobs,))
    ESTIMATORS[name](logprobs, ref_logprobs).sum().backward()
    assert ref_logprobs.grad is None


@each_estimator
def test_garbage_at_masked_positions_does_not_leak_and_a_counted_one_is_seen(name: str) -> None:
    logprobs, ref_logprobs = randoms(4, 4, 5, num=2)
    mask = random_mask(4, 4, 5)
    expected = logprobs.clone().requires_grad_()
    loss = token_mean(ESTIMATORS[name](expected, ref_logprobs), mask)
    loss.backward()
    garbage = with_garbage(logprobs, mask), with_garbage(ref_logprobs.flip(0), mask)
    for x, ref in ((garbage[0], ref_logprobs), (logprobs, garbage[1].where(~mask, ref_logprobs))):
        x = x.clone().requires_grad_()
        dirty_loss = token_mean(ESTIMATORS[name](x, ref), mask)
        dirty_loss.backward()
        assert_close((dirty_loss, x.grad), (loss, expected.grad), rtol=0, atol=0)
    assert not ESTIMATORS[name](torch.full_like(logprobs, torch.nan), ref_logprobs).isfinite().any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 6))
def test_exact_equals_a_naive_loop(seed: int, vocab: int) -> None:
    logits, ref_logits = (3 * x for x in randoms(seed, 2, 3, vocab, num=2))
    expected = [
        [loops.categorical_kl(logits[i, t].tolist(), ref_logits[i, t].tolist()) for t in range(3)] for i in range(2)
    ]
    assert_close(exact(logits, ref_logits), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_exact_hand_computed() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): log(2)/2 + log(2/3)/2 = log(4/3)/2
    logits, ref_logits = torch.zeros(1, 1, 2).double(), torch.tensor([[[1.0, 3.0]]]).double().log()
    assert exact(logits, ref_logits).item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-12)


def test_exact_gradcheck() -> None:
    logits, ref_logits = randoms(5, 2, 2, 4, num=2)
    assert torch.autograd.gradcheck(lambda x: exact(x, ref_logits), (logits.requires_grad_(),))


def test_exact_leaves_out_tokens_without_mass_and_is_infinite_where_the_reference_has_none() -> None:
    no_mass = torch.tensor([[[0.0, 0.0, -torch.inf]]], dtype=torch.float64, requires_grad=True)
    full = torch.zeros(1, 1, 3, dtype=torch.float64)
    value = exact(no_mass, full)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(1.5), rel=1e-12)
    assert_close(no_mass.grad, torch.zeros_like(full), rtol=0, atol=1e-15)  # by symmetry
    assert exact(no_mass, no_mass).item() == 0.0
    assert exact(full, no_mass).item() == math.inf


def test_exact_with_garbage_at_masked_positions_does_not_leak() -> None:
    logits, ref_logits = randoms(6, 2, 3, 4, num=2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    dirty = with_garbage(logits, mask[..., None].expand_as(logits)).requires_grad_()
    clean = logits.clone().requires_grad_()
    for x in (clean, dirty):
        token_mean(exact(x, ref_logits), mask).backward()
    assert_close(dirty.grad, clean.grad, rtol=0, atol=0)


def test_exact_normalises_bfloat16_in_float32() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_close(exact(logits, logits.flip(-1)), exact(logits.float(), logits.flip(-1).float()), rtol=1e-6, atol=1e-7)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have one shape, got logprobs \[3, 3\], ref_logprobs \[3\]"):
        k3(torch.zeros(3, 3), torch.zeros(3))
