from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlft.functional import logprobs as module
from rlft.functional.kl import exact
from rlft.functional.logprobs import exact_kl, token_logprobs
from tests.functional.tensors import randoms
from tests.oracles import loops

CHUNKS = [None, 1, 3, 7]  # one chunk (kept for the backward pass), rows alone, uneven, exact


def head(seed: int = 0, rows: int = 7, width: int = 4, vocab: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    (hidden,), (weight,) = randoms(seed, rows, width), randoms(seed + 1, vocab, width)
    ids = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    return hidden.requires_grad_(), weight.requires_grad_(), ids


def plain(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """All logits at once, with autograd's gradients."""
    logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp[torch.arange(len(ids)), ids], entropy if entropy_grad else entropy.detach()


def test_hand_computed_values() -> None:
    # logits (log 1, log 2, log 1): p = (1/4, 1/2, 1/4), entropy 1.5 log 2
    weight = torch.tensor([[1.0], [2.0], [1.0]]).double().log()
    values, entropy = token_logprobs(torch.ones(1, 1).double(), weight, torch.tensor([1]))
    assert values.item() == pytest.approx(-0.6931471805599453, rel=1e-12)
    assert entropy.item() == pytest.approx(1.0397207708399179, rel=1e-12)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_equals_a_naive_loop(chunk_rows: int | None) -> None:
    hidden, weight, ids = head()
    values, entropy = token_logprobs(hidden, weight, ids, temperature=0.7, chunk_rows=chunk_rows)
    for n, token in enumerate(ids.tolist()):
        logits = [sum(h * w for h, w in zip(hidden[n].tolist(), row, strict=True)) / 0.7 for row in weight.tolist()]
        want = loops.token_logprob(logits, token)
        assert (values[n].item(), entropy[n].item()) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("entropy_grad", [False, True])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.3, 3))
def test_gradients_equal_autograds(chunk_rows: int | None, entropy_grad: bool, seed: int, temperature: float) -> None:
    hidden, weight, ids = head(seed)
    (weights,) = randoms(seed + 2, 2, 7)
    options_ = {"temperature": temperature, "entropy_grad": entropy_grad}
    results = []
    for call, options in ((plain, options_), (token_logprobs, {**options_, "chunk_rows": chunk_rows})):
        values, entropy = call(hidden, weight, ids, **options)
        gradients = torch.autograd.grad((weights[0] * values + weights[1] * entropy).sum(), (hidden, weight))
        results.append((values.detach(), entropy.detach(), *gradients))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_gradcheck(chunk_rows: int | None) -> None:
    hidden, weight, ids = head(3)
    call = lambda h, w: token_logprobs(h, w, ids, temperature=0.8, entropy_grad=True, chunk_rows=chunk_rows)  # noqa: E731
    assert torch.autograd.gradcheck(call, (hidden, weight))


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_entropy_alone_has_a_gradient_and_a_detached_one_has_none(chunk_rows: int | None) -> None:
    hidden, weight, ids = head(4)
    want = torch.autograd.grad(plain(hidden, weight, ids, 1.0, True)[1].sum(), (hidden, weight))
    _, entropy = token_logprobs(hidden, weight, ids, entropy_grad=True, chunk_rows=chunk_rows)
    assert_close(torch.autograd.grad(entropy.sum(), (hidden, weight)), want, rtol=1e-9, atol=1e-12)
    assert not token_logprobs(hidden, weight, ids, chunk_rows=chunk_rows)[1].requires_grad


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_is_computed_for_what_needs_one(chunk_rows: int | None, which: int) -> None:
    tensors = head(5)
    tensors[1 - which].requires_grad_(False)
    want = torch.autograd.grad(plain(*tensors, 1.0, False)[0].sum(), tensors[which])
    values, _ = token_logprobs(*tensors, chunk_rows=chunk_rows)
    assert_close(torch.autograd.grad(values.sum(), tensors[which]), want, rtol=1e-9, atol=1e-12)


def test_backward_may_run_twice() -> None:
    hidden, weight, ids = head(6)
    values, _ = token_logprobs(hidden, weight, ids)
    first = torch.autograd.grad(values.sum(), hidden, retain_graph=True)
    assert_close(torch.autograd.grad(values.sum(), hidden), first, rtol=0, atol=0)


def test_without_rows_the_result_is_empty_and_the_gradient_zero() -> None:
    hidden, weight, ids = head(7)
    values, entropy = token_logprobs(hidden[:0], weight, ids[:0])
    values.sum().backward()
    assert values.shape == entropy.shape == (0,)
    assert (weight.grad == 0).all()


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = module._log_softmax

    def spy(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
        seen.append(hidden.shape[0])
        return original(hidden, weight, temperature)

    monkeypatch.setattr(module, "_log_softmax", spy)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 6 * 8)  # three rows of six float64 entries
    values, _ = token_logprobs(*head(8))
    values.sum().backward()
    assert seen == [3, 3, 1] * 2  # forward, and again in the backward pass
    seen.clear()
    values, _ = token_logprobs(*head(8, rows=3))
    values.sum().backward()
    assert seen == [3]  # a single chunk is kept


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_bfloat16_is_normalised_in_float32_and_gradients_keep_their_dtypes(chunk_rows: int | None) -> None:
    hidden, weight, ids = head(9)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    values, entropy = token_logprobs(*low, ids, chunk_rows=chunk_rows)
    logp = torch.log_softmax((low[0] @ low[1].T).float(), -1)
    assert values.dtype == entropy.dtype == torch.float32
    assert_close(values, logp[torch.arange(7), ids], rtol=1e-6, atol=1e-6)
    values.sum().backward()
    want = torch.autograd.grad(token_logprobs(hidden, weight, ids)[0].sum(), (hidden, weight))
    for x, gradient in zip(low, want, strict=True):
        assert x.grad.dtype == torch.bfloat16
        assert_close(x.grad.double(), gradient, rtol=0.05, atol=0.1)  # bfloat16 has 8 bits


def test_autocast_decides_the_dtype_of_the_product_and_the_gradients_stay_float32() -> None:
    hidden, weight, ids = (x.detach().float() if x.is_floating_point() else x for x in head(10))
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = token_logprobs(hidden, weight, ids)
    want, _ = token_logprobs(hidden.bfloat16(), weight.bfloat16(), ids)
    assert_close(values, want, rtol=0, atol=0)
    values.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_exact_kl_equals_the_kl_of_the_logits(chunk_rows: int | None) -> None:
    (hidden, ref_hidden), (weight,), (ref_weight,) = randoms(11, 7, 4, num=2), randoms(12, 6, 4), randoms(13, 6, 4)
    want = exact(hidden @ weight.T / 0.7, ref_hidden @ ref_weight.T / 0.7)
    got = exact_kl(hidden, ref_hidden, weight.requires_grad_(), ref_weight, temperature=0.7, chunk_rows=chunk_rows)
    assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert not got.requires_grad
    assert (exact_kl(hidden, hidden, weight, weight) == 0).all()


def test_wrong_arguments_are_refused() -> None:
    hidden, weight, ids = head()
    for call, message in [
        (lambda: token_logprobs(hidden[None], weight, ids), r"hidden must be \[N, C\].*flatten"),
        (lambda: token_logprobs(hidden, weight[:, :2], ids), "with the same C"),
        (lambda: token_logprobs(hidden, weight, ids[:3]), r"ids must be \[N\] = \[7\].*got \[3\]"),
        (lambda: token_logprobs(hidden, weight, ids, temperature=0.0), "temperature must be greater than 0"),
        (lambda: token_logprobs(hidden, weight, ids, chunk_rows=0), "chunk_rows must be at least 1"),
        (lambda: exact_kl(hidden, hidden, weight, weight[:5]), "same rows and vocabulary, got 7 and 7 rows, 6 and 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
