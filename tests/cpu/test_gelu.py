from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.cpu import compiled
from rlft.cpu.gelu import MIN_SIZE, gelu

pytest.importorskip("numba")

UNIT = 2.0**-23  # spacing of float32 at 1


def inputs(size: int = MIN_SIZE, scale: float = 3.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)) * scale


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own in float64: values and gradients."""
    x = x.detach().double().requires_grad_()
    y = F.gelu(x, approximate="tanh")
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_values_and_gradients_are_those_of_float64_to_rounding() -> None:
    x = inputs().requires_grad_()
    y = gelu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected, expected_grad = exact(x)
    size = x.detach().abs().double()
    assert type(y.grad_fn).__name__ == "_GeluBackward"
    # u has a few roundings of its own: where u is large so is its error, until the sigmoid is flat.
    assert ((y - expected).abs() <= 4 * UNIT * size + 1e-30).all()
    assert ((grad - expected_grad).abs() <= 8 * UNIT * (1 + size)).all()


def test_an_incoming_gradient_is_a_factor_whatever_its_strides() -> None:
    x, factor = inputs().view(256, -1).requires_grad_(), inputs(scale=1.0).view(-1, 256).t()
    (grad,) = torch.autograd.grad(gelu(x), x, factor)
    torch.testing.assert_close(grad, factor * exact(x)[1].float(), atol=1e-5, rtol=1e-5)


def test_far_out_it_is_x_or_nothing_and_nan_stays_nan() -> None:
    far = torch.tensor([torch.inf, 1e30, 1e15, 50.0, 0.0, -0.0, -11.0, -50.0, -1e15, -1e30, -torch.inf, torch.nan])
    x = torch.cat([far, torch.zeros(MIN_SIZE)]).requires_grad_()
    y, expected = gelu(x)[: len(far)], F.gelu(far, approximate="tanh")
    assert torch.equal(y[:6], far[:6]) and y[10:].isnan().all()
    torch.testing.assert_close(y[:10], expected[:10], atol=1e-20, rtol=0)
    (grad,) = torch.autograd.grad(y[2:9].sum(), x)
    torch.testing.assert_close(grad[2:9], torch.tensor([1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [MIN_SIZE, MIN_SIZE + 1, 3 * MIN_SIZE + 777])
def test_the_number_of_threads_changes_no_bit(size: int) -> None:
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x = inputs(size).requires_grad_()
        y = gelu(x)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "x", [inputs(MIN_SIZE - 1), inputs().double(), inputs().bfloat16(), inputs().view(256, -1).t()], ids=str
)
def test_what_it_is_not_made_for_is_torchs(x: Tensor) -> None:
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))


def test_without_numba_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "is_possible", lambda: False)
    assert torch.equal(gelu(inputs()), F.gelu(inputs(), approximate="tanh"))
