"""DPO, SimPO, ORPO and KTO against Liger-Kernel's (as TRL uses them)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlft.functional.preference import dpo, kto, orpo, simpo
from tests.functional.tensors import randoms

chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="pip install --no-deps liger-kernel==0.8.5")

from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction  # noqa: E402
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction  # noqa: E402
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction  # noqa: E402
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction  # noqa: E402

PAIRS = 5


def compare(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    for got, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert wanted.abs().max() > 1e-3
        assert_close(got, wanted, rtol=1e-10, atol=1e-14)


def sums() -> list[Tensor]:
    """Logprobs of chosen, rejected and of the reference, summed over 3 tokens: each a few nats below 0."""
    return [(3 * (-x.abs() - 0.1)) for x in randoms(4, PAIRS, num=4)]


def target(rows: int) -> Tensor:
    return torch.zeros(rows, 3)  # Liger reads only the number of rows


def test_dpo() -> None:
    chosen, rejected, *refs = sums()
    inputs = chosen.requires_grad_(), rejected.requires_grad_()
    theirs = LigerFusedLinearDPOFunction.preference_loss_fn(*inputs, target(2 * PAIRS), *refs, beta=0.3)[0]
    compare(dpo(*inputs, *refs, beta=0.3).mean(), theirs, *inputs)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_of_means(name: str) -> None:
    inputs = [x.requires_grad_() for x in sums()[:2]]
    means, lengths = [x / 3 for x in inputs], torch.full((PAIRS,), 3.0)
    if name == "simpo":
        ours = simpo(*inputs, lengths, lengths, beta=2.0, gamma=0.7).mean()
        theirs = LigerFusedLinearSimPOFunction.preference_loss_fn(*means, target(2 * PAIRS), beta=2.0, gamma=0.7)[0]
    else:
        ours = orpo(*inputs, lengths, lengths, beta=0.4).mean()
        theirs = LigerFusedLinearORPOFunction.preference_loss_fn(*means, target(2 * PAIRS), beta=0.4)[0]
        theirs = theirs - means[0].mean()  # Liger adds the likelihood elsewhere
    compare(ours, theirs, *inputs)


def test_kto() -> None:
    logprobs, ref, *_ = sums()
    logprobs.requires_grad_()
    labels, z0 = torch.tensor([True, False, True, True, False]), torch.tensor(0.4, dtype=torch.float64)
    theirs = LigerFusedLinearKTOFunction.preference_loss_fn(logprobs, labels, target(PAIRS), ref, beta=0.3, kl=z0)[0]
    compare(kto(logprobs, ref, labels, z0, beta=0.3).mean(), theirs, logprobs)
