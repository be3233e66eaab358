from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlft.functional.aggregation import constant, sequence_mean, sequence_sum, token_mean
from tests.functional.tensors import holed_mask, padded, random_mask, randoms, with_garbage
from tests.oracles import loops

KINDS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": partial(constant, length=7),
}
COUNT_NAMES = {name: "num_tokens" if name == "token_mean" else "num_sequences" for name in KINDS}
X = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("token_mean", 16 / 4), ("sequence_mean", (2 + 10 + 0) / 3), ("sequence_sum", 16 / 3), ("constant", 16 / 21)],
)
def test_hand_computed_values(kind: str, expected: float) -> None:
    assert KINDS[kind](X, MASK).item() == pytest.approx(expected, rel=1e-12)


@each_kind
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), times=st.integers(1, 7))
def test_equals_a_naive_loop(kind: str, seed: int, rows: int, times: int) -> None:
    (x,), mask = randoms(seed, rows, times), holed_mask(seed, rows, times)
    expected = loops.aggregate(x.tolist(), mask.tolist(), kind, length=7)
    assert KINDS[kind](x, mask).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@each_kind
def test_bool_and_float_masks_agree(kind: str) -> None:
    assert_close(KINDS[kind](X, MASK), KINDS[kind](X, MASK.double()), rtol=0, atol=0)


@each_kind
def test_garbage_outside_the_mask_leaks_neither_into_the_value_nor_into_the_gradient(kind: str) -> None:
    clean = X.clone().requires_grad_()
    dirty = with_garbage(X, MASK).requires_grad_()
    losses = [KINDS[kind](x, MASK) for x in (clean, dirty)]
    for loss in losses:
        loss.backward()
    assert_close(losses[1], losses[0], rtol=0, atol=0)
    assert_close(dirty.grad, clean.grad, rtol=0, atol=0)
    assert (dirty.grad[~MASK] == 0).all()


@each_kind
def test_padding_changes_nothing(kind: str) -> None:
    longer = padded(X, 4), torch.cat([MASK, torch.zeros(3, 4, dtype=torch.bool)], 1)
    assert_close(KINDS[kind](*longer), KINDS[kind](X, MASK), rtol=1e-12, atol=0)


@each_kind
@pytest.mark.parametrize("as_tensor", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 5))
def test_micro_batches_with_global_counts_add_up_to_the_whole(kind: str, as_tensor: bool, seed: int, cut: int) -> None:
    (x,), mask = randoms(seed, 6, 5), random_mask(seed, 6, 5)
    count = int(mask.sum()) if kind == "token_mean" else 6
    given_count = {COUNT_NAMES[kind]: torch.tensor(count) if as_tensor else count}
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = KINDS[kind](whole, mask)
    loss.backward()
    total = 0.0
    for rows in (slice(0, cut), slice(cut, 6)):
        part = KINDS[kind](parts[rows], mask[rows], **given_count)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
    assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-15)


@each_kind
@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_a_batch_without_tokens_is_zero_and_has_a_zero_gradient(kind: str, count: int | None) -> None:
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    loss = KINDS[kind](x, torch.zeros(2, 3), **({} if count is None else {COUNT_NAMES[kind]: count}))
    loss.backward()
    assert loss.item() == 0.0
    assert (x.grad == 0).all()


@each_kind
def test_a_counted_nan_is_seen(kind: str) -> None:
    assert KINDS[kind](X.index_fill(1, torch.tensor([0]), torch.nan), MASK).isnan()


@each_kind
def test_gradcheck(kind: str) -> None:
    assert torch.autograd.gradcheck(lambda x: KINDS[kind](x, MASK), (X.clone().requires_grad_(),))


def test_bfloat16_is_summed_in_float32() -> None:
    x = torch.ones(1, 1000, dtype=torch.bfloat16)
    assert token_mean(x, torch.ones_like(x)).item() == 1.0
    assert sequence_sum(x + 0.0, x).dtype == torch.float32


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must have the shape .*\[3, 3\], got \[3\]"):
        token_mean(X, MASK[0])
    with pytest.raises(ValueError, match=r"x must be \[B, T\], got \[3\]"):
        token_mean(X[0], MASK[0])
    with pytest.raises(ValueError, match="length must be greater than 0"):
        constant(X, MASK, length=0)
