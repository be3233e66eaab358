"""Losses on pairs: a chosen and a rejected completion of one prompt.

Each returns the loss of every pair [B], to be averaged over the pairs of the whole optimizer batch. With
h = (chosen - ref_chosen) - (rejected - ref_rejected), the margin of the pair's summed log ratios. Gradients flow into
`chosen` and `rejected`; the reference is detached.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the DPO loss (arXiv:2305.18290, eq. 7), conservative with label smoothing (Mitchell 2023, cDPO).

        loss = -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)

    Args:
        chosen, rejected: [B] floating, the policy's logprobs summed over each completion's tokens.
        ref_chosen, ref_rejected: [B], likewise the reference's.
        beta: strength of the KL constraint, > 0.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5).

    Returns:
        [B], at least 0.

    Raises:
        ValueError: for a beta or a label smoothing outside its range.
    """
    _check_beta(beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5): at 0.5 nothing is preferred, got {label_smoothing}")
    scaled = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    loss = -(1.0 - label_smoothing) * logsigmoid(scaled)
    return loss - label_smoothing * logsigmoid(-scaled) if label_smoothing else loss


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """Return the IPO loss (arXiv:2310.12036, eq. 17): the margin is regressed on 1 / (2 beta), so it cannot run away.

        loss = (h - 1 / (2 beta))^2

    Args:
        chosen, rejected: [B] floating, the policy's logprobs of each completion: summed in the paper; TRL takes the
            mean over tokens, which the caller may pass just as well.
        ref_chosen, ref_rejected: [B], likewise the reference's.
        beta: the paper's tau, > 0.

    Returns:
        [B], at least 0.

    Raises:
        ValueError: for a beta that is not positive.
    """
    _check_beta(beta)
    return (_margin(chosen, rejected, ref_chosen, ref_rejected) - 1.0 / (2.0 * beta)).square()


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
    """Return the negative log-likelihood of the preference under Bradley and Terry's model (1952), for reward models.

        loss = -log sigmoid(chosen - rejected - margin)      (margin: Llama 2, arXiv:2307.09288, eq. 2)

    Args:
        chosen, rejected: [B] floating, the reward model's scores.
        margin: [B] or a number, by how much the chosen score should be the larger; None: 0.

    Returns:
        [B], at least 0.
    """
    _check_pairs(chosen, rejected)
    difference = chosen - rejected
    return -logsigmoid(difference if margin is None else difference - margin)


def _margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Return h, [B]."""
    _check_pairs(chosen, rejected, ref_chosen, ref_rejected)
    return (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())


def _check_pairs(*logprobs: Tensor) -> None:
    """Refuse tensors that broadcasting would pair up wrongly."""
    shapes = [list(x.shape) for x in logprobs]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 1:
        raise ValueError(f"pairs must all be [B], one number for each completion, got {shapes}")


def _check_beta(beta: float) -> None:
    """Refuse a strength that is not positive."""
    if not (beta > 0.0 and beta < torch.inf):
        raise ValueError(f"beta must be greater than 0 and finite (0.1 is usual), got {beta}")
