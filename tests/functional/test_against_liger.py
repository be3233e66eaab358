"""The losses of algorithms, composed from our parts, against Liger-Kernel's (as TRL uses them)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlft.functional.aggregation import constant, sequence_mean, token_mean
from rlft.functional.kl import k3
from rlft.functional.surrogates import cispo, clipped, sapo, sequence_ratio
from tests.functional.tensors import random_mask, randoms

grpo_loss = pytest.importorskip(
    "liger_kernel.chunked_loss.grpo_loss", reason="pip install --no-deps liger-kernel==0.8.5"
)

BETA = 0.04
OURS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]] = {
    "token": lambda x, old, a, _mask: clipped(x, old, a, clip_low=0.1, clip_high=0.3),
    "sequence": lambda x, old, a, mask: sequence_ratio(x, old, a, mask, clip_low=0.1, clip_high=0.3),
    "sapo": lambda x, old, a, _mask: sapo(x, old, a, tau_pos=1.0, tau_neg=1.05),
    "cispo": lambda x, old, a, _mask: cispo(x, old, a, clip_high=1.3),
}
AGGREGATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": sequence_mean,
    "dr_grpo": lambda x, mask: constant(x, mask, length=9),
    "dapo": token_mean,
    "bnpo": token_mean,
}


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize(
    ("surrogate", "loss_type", "aggregation"),
    [
        ("token", "grpo", "grpo"),
        ("token", "dr_grpo", "dr_grpo"),
        ("token", "dapo", "dapo"),
        ("token", "bnpo", "bnpo"),
        ("sequence", "grpo", "grpo"),
        ("sequence", "dr_grpo", "dr_grpo"),
        ("cispo", "cispo", "dapo"),
        ("sapo", "sapo", "grpo"),
    ],
)
def test_loss_gradient_clip_fraction_and_kl_equal_ligers(
    surrogate: str, loss_type: str, aggregation: str, beta: float
) -> None:
    logprobs, old, ref = (0.2 * x - 2 for x in randoms(1, 8, 7, num=3))
    (advantages,), mask = randoms(2, 8), random_mask(3, 8, 7)
    assert not mask.all(1).all()
    logprobs.requires_grad_()
    theirs, metrics = grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logprobs,
        mask.double(),
        advantages,
        mask.double(),
        ref_per_token_logps=ref,
        old_per_token_logps=old,
        epsilon_low=0.1,
        epsilon_high=1.3 if surrogate == "cispo" else 0.3,
        beta=beta,
        loss_type=loss_type,
        max_completion_length=9,
        importance_sampling_level="sequence" if surrogate == "sequence" else "token",
    )
    loss, statistics = OURS[surrogate](logprobs, old, advantages, mask)
    kl = k3(logprobs, ref)
    ours = AGGREGATE[aggregation](loss + beta * kl, mask)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    gradients = [torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-3
    assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)
    if surrogate not in ("cispo", "sapo"):  # sapo has no clip; Liger's cispo counts positive advantages only
        clip_fraction = token_mean(statistics["clip_ratio/region"], mask)
        assert 0 < clip_fraction < 1
        assert_close(clip_fraction, metrics[-1], rtol=1e-12, atol=0)
    if beta:
        assert_close(token_mean(kl, mask), metrics[0], rtol=1e-10, atol=1e-14)
