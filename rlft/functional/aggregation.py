"""From a per-token quantity [B, T] to the scalar that is minimised, with four choices of the denominator.

The choice decides the weight of a token in a long completion (Dr. GRPO, arXiv:2503.20783, section 3; DAPO,
arXiv:2503.14476, section 3.3). Each is a masked sum divided by a count. `num_tokens` and `num_sequences` are the counts
of the whole optimizer batch, over all micro-batches and ranks. With them, the results of the micro-batches add up to
the result of the whole batch, however it was divided. (DDP averages gradients over ranks, so each rank multiplies by
the world size.) Without them, the counts are those of the tensor itself.

`mask` is bool or float, true where a token counts. Elsewhere `x` may hold anything, even nan, and its gradient is zero.
Rows without a token contribute 0; no denominator is below 1. Sums are in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.functional.masking import as_bool, zero_outside

Count = int | float | Tensor


def token_mean(x: Tensor, mask: Tensor, *, num_tokens: Count | None = None) -> Tensor:
    """Return the mean over tokens: every token has the same weight (DAPO, arXiv:2503.14476, eq. 8; BNPO).

        sum_{i,t} m_it x_it / max(1, num_tokens)

    Args:
        x: [B, T] floating.
        mask: [B, T] bool or float.
        num_tokens: tokens in the whole optimizer batch, int or 0-dim tensor; default: those of this mask.

    Returns:
        A scalar.
    """
    return _masked_sum(x, mask).sum() / _at_least_one(as_bool(mask, x).sum() if num_tokens is None else num_tokens)


def sequence_mean(x: Tensor, mask: Tensor, *, num_sequences: Count | None = None) -> Tensor:
    """Return the mean over sequences of each sequence's token mean (GRPO, arXiv:2402.03300, eq. 3).

        sum_i [ sum_t m_it x_it / max(1, sum_t m_it) ] / max(1, num_sequences)

    As in TRL, a sequence without a token contributes 0 but is counted in the denominator.

    Args:
        x: [B, T] floating.
        mask: [B, T] bool or float.
        num_sequences: rows in the whole optimizer batch, int or 0-dim tensor; default: B.

    Returns:
        A scalar.
    """
    per_sequence = _masked_sum(x, mask) / as_bool(mask, x).sum(-1).clamp(min=1)
    return per_sequence.sum() / _at_least_one(x.shape[0] if num_sequences is None else num_sequences)


def sequence_sum(x: Tensor, mask: Tensor, *, num_sequences: Count | None = None) -> Tensor:
    """Return the mean over sequences of each sequence's sum: the policy gradient for a reward of the sequence (RLOO).

        sum_{i,t} m_it x_it / max(1, num_sequences)

    Args:
        x: [B, T] floating.
        mask: [B, T] bool or float.
        num_sequences: rows in the whole optimizer batch, int or 0-dim tensor; default: B, empty rows included.

    Returns:
        A scalar.
    """
    return _masked_sum(x, mask).sum() / _at_least_one(x.shape[0] if num_sequences is None else num_sequences)


def constant(x: Tensor, mask: Tensor, *, length: float, num_sequences: Count | None = None) -> Tensor:
    """Return `sequence_sum` divided by a constant length: on the scale of a mean (Dr. GRPO, arXiv:2503.20783).

        sum_{i,t} m_it x_it / (length * max(1, num_sequences))

    Args:
        x: [B, T] floating.
        mask: [B, T] bool or float.
        length: tokens, > 0; usually the largest number of new tokens. It does not depend on what was sampled.
        num_sequences: rows in the whole optimizer batch, int or 0-dim tensor; default: B, empty rows included.

    Returns:
        A scalar.

    Raises:
        ValueError: if `length` is not positive.
    """
    if not length > 0:
        raise ValueError(f"length must be greater than 0 (the largest number of new tokens), got {length}")
    return sequence_sum(x, mask, num_sequences=num_sequences) / length


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return sum_t m_it x_it, [B]."""
    if x.dim() != 2:
        raise ValueError(f"x must be [B, T], got {list(x.shape)}")
    return zero_outside(x, mask).sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _at_least_one(count: Count) -> Count:
    """Return max(1, count)."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
