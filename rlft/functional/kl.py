"""KL(policy || reference) from samples, and exactly.

k1, k2 and k3 are J. Schulman's estimators ("Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html), for
tokens that the policy sampled, with d = logprob - ref_logprob. The gradient of an estimator of the KL is not always an
estimate of the KL's gradient. On policy:

    | estimator | E[value]     | E[gradient]               | use                                                |
    |-----------|--------------|---------------------------|----------------------------------------------------|
    | k1        | KL(pi||ref)  | 0                         | in the reward; useless as a loss                   |
    | k2        | biased       | grad KL(pi||ref)          | in the loss                                        |
    | k3        | KL(pi||ref)  | grad KL(ref||pi)          | in the loss (GRPO); never negative, low variance   |

Applied to the logprob of a token, this is the KL of the next-token distributions; applied to the summed logprob of a
sequence, it is that of the sequences. Gradients flow into `logprobs`; the reference is detached. Where an input is not
finite, the result is nan and the gradient 0: a masked position then has no effect, and one that counts is noticed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.functional.masking import require_same_shape


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the log ratio: unbiased, and of either sign.

        k1 = logprob - ref_logprob

    Args:
        logprobs, ref_logprobs: [B, T] (or any one shape) floating, of tokens that the policy sampled.

    Returns:
        [B, T], nats.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs.detach()


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return half the squared log ratio: biased and never negative; its expected gradient is that of KL(pi||ref).

        k2 = (logprob - ref_logprob)^2 / 2

    Args:
        logprobs, ref_logprobs: [B, T] (or any one shape) floating, of tokens that the policy sampled.

    Returns:
        [B, T], nats.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    difference = logprobs - ref_logprobs.detach()
    sound = difference.isfinite()
    difference = torch.where(sound, difference, 0.0)
    return torch.where(sound, 0.5 * difference.square(), torch.nan)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return Schulman's unbiased and non-negative estimator, which GRPO's loss uses (arXiv:2402.03300, eq. 4).

        k3 = exp(-d) - 1 + d,   d = logprob - ref_logprob

    Args:
        logprobs, ref_logprobs: [B, T] (or any one shape) floating, of tokens that the policy sampled.

    Returns:
        [B, T], nats; nan where exp(-d) overflows.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    minus_d = ref_logprobs.detach() - logprobs
    sound = minus_d.isfinite() & minus_d.detach().exp().isfinite()
    minus_d = torch.where(sound, minus_d, 0.0)
    return torch.where(sound, torch.expm1(minus_d) - minus_d, torch.nan)


def exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Return the exact KL(pi || ref) of the distributions at each position, differentiable in `logits`.

        KL = sum_v p_v (log p_v - log q_v),   p = softmax(logits), q = softmax(ref_logits)

    An entry with p_v = 0 (a logit of -inf) contributes 0; q_v = 0 where p_v > 0 gives inf. The logits of both models
    are in memory at once; for a large vocabulary, `rlft.functional.logprobs.exact_kl` works on hidden states in chunks.

    Args:
        logits, ref_logits: [B, T, V] floating (or any leading shape), already divided by the temperature.

    Returns:
        [B, T], nats; float64 for float64 input, else float32. nan, with a zero gradient, where logits hold nan or +inf.
    """
    require_same_shape(logits=logits, ref_logits=ref_logits)
    ref_logits = ref_logits.detach()
    sound = logits.detach().amax(-1).isfinite() & ref_logits.amax(-1).isfinite()  # amax of nan is nan
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = torch.log_softmax(torch.where(sound[..., None], logits, 0.0), dim=-1, dtype=dtype)
    logq = torch.log_softmax(torch.where(sound[..., None], ref_logits, 0.0), dim=-1, dtype=dtype)
    difference = torch.where(logp == -torch.inf, 0.0, logp - logq)  # -inf - -inf is nan
    return torch.where(sound, (logp.exp() * difference).sum(-1), torch.nan)
