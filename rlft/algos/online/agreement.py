"""Contract 5: what the sampler said of its tokens, the trainer says as well."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.core.errors import NonFiniteError
from rlft.core.metrics import Means

MAX_LOGPROB_DIFFERENCE = 1e-3  # between sampler and trainer in float32, nats


def check_sampler(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, means: Means, *, is_float32: bool) -> None:
    """Log the largest difference between the trainer's and the sampler's logprobs [B, T] at the first update.

    Raises `NonFiniteError` where it is above `MAX_LOGPROB_DIFFERENCE` in float32.
    """
    difference = (logprobs.detach() - old_logprobs).abs()
    means.add_max("sampling/sampling_logp_difference/max", difference, mask)
    largest = float(torch.where(mask, difference, 0.0).max())
    if is_float32 and largest > MAX_LOGPROB_DIFFERENCE:
        raise NonFiniteError(
            f"the sampler's logprobs differ from the trainer's by up to {largest:.1e} nats (allowed in float32: "
            f"{MAX_LOGPROB_DIFFERENCE:g}): the policy that sampled is not the one that is trained"
        )
