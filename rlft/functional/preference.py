"""Losses on preferences: pairs of a chosen and a rejected completion of one prompt, or completions with a label.

Each returns the loss of every pair (or completion) [B]; the caller averages over the whole optimizer batch. In the
formulas, h = (chosen - ref_chosen) - (rejected - ref_rejected) is the margin between the pair's log ratios. Gradients
flow into `chosen` and `rejected`; the reference is detached. A loss without `ref_` arguments needs no reference.
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
    """Return the DPO loss (arXiv:2305.18290, eq. 7); with label smoothing, conservative DPO (cDPO, Mitchell 2023).

        loss = -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)

    Args:
        chosen, rejected: [B] floating, the policy's logprobs summed over each completion's tokens.
        ref_chosen, ref_rejected: [B], the same of the reference.
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
    """Return the IPO loss (arXiv:2310.12036, eq. 17): it regresses the margin on 1 / (2 beta), which bounds the margin.

        loss = (h - 1 / (2 beta))^2

    Args:
        chosen, rejected: [B] floating, the policy's logprobs of each completion: their sum over tokens in the paper,
            their mean in TRL.
        ref_chosen, ref_rejected: [B], the same of the reference.
        beta: the paper's tau, > 0.

    Returns:
        [B], at least 0.

    Raises:
        ValueError: for a beta that is not positive.
    """
    _check_beta(beta)
    return (_margin(chosen, rejected, ref_chosen, ref_rejected) - 1.0 / (2.0 * beta)).square()


def simpo(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """Return the SimPO loss (arXiv:2405.14734, eq. 6), whose reward is the mean logprob per token.

        loss = -log sigmoid(beta chosen / |chosen| - beta rejected / |rejected| - gamma)

    Args:
        chosen, rejected: [B] floating, the policy's logprobs summed over each completion's tokens.
        chosen_lengths, rejected_lengths: [B], tokens of each completion, at least 1.
        beta: scale of the reward, > 0; 2 to 2.5 in the paper.
        gamma: margin between the two rewards, at least 0; 0.3 to 1.6 in the paper.

    Returns:
        [B], at least 0.

    Raises:
        ValueError: for a beta that is not positive or a negative gamma.
    """
    _check_beta(beta)
    if not gamma >= 0.0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    _check_pairs(chosen, rejected, chosen_lengths, rejected_lengths)
    return -logsigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float) -> Tensor:
    """Return the ORPO loss (arXiv:2403.07691, eq. 6 and 7): the likelihood of the chosen completion and an odds ratio.

        loss = -m_c - beta log sigmoid(log odds(m_c) - log odds(m_r)),   odds(m) = e^m / (1 - e^m)

    with m the mean logprob per token. In the published code and in TRL, the first term includes the prompt's tokens and
    is the mean over all tokens of the batch. Here it is over the completion's tokens, and all pairs weigh the same.

    Args:
        chosen, rejected: [B] floating, the policy's logprobs summed over each completion's tokens.
        chosen_lengths, rejected_lengths: [B], tokens of each completion, at least 1.
        beta: the paper's lambda, > 0; 0.1 to 0.25 in the paper.

    Returns:
        [B], at least 0.

    Raises:
        ValueError: for a beta that is not positive.
    """
    _check_beta(beta)
    _check_pairs(chosen, rejected, chosen_lengths, rejected_lengths)
    chosen_mean, rejected_mean = chosen / chosen_lengths, rejected / rejected_lengths
    return -chosen_mean - beta * logsigmoid(_log_odds(chosen_mean) - _log_odds(rejected_mean))


def kto(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    is_desirable: Tensor,
    z0: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the KTO loss (arXiv:2402.01306, eq. 8) of completions that are desirable or not, without pairs.

        loss = w_d (1 - sigmoid(beta (r - z0)))  if desirable, else  w_u (1 - sigmoid(beta (z0 - r)))

    with r = logprobs - ref_logprobs and z0 = `kto_reference_point`, which is detached.

    Args:
        logprobs: [B] floating, the policy's logprobs summed over each completion's tokens.
        ref_logprobs: [B], the same of the reference.
        is_desirable: [B] bool.
        z0: scalar or [B], nats.
        beta: strength of the KL constraint, > 0.
        desirable_weight, undesirable_weight: > 0. The paper recommends that weight x number of the desirable
            completions is 1 to 4/3 times weight x number of the undesirable ones.

    Returns:
        [B], between 0 and the completion's weight.

    Raises:
        ValueError: for a beta or a weight that is not positive.
    """
    _check_beta(beta)
    if not (desirable_weight > 0.0 and undesirable_weight > 0.0):
        raise ValueError(f"weights must be greater than 0, got {desirable_weight} and {undesirable_weight}")
    _check_pairs(logprobs, ref_logprobs, is_desirable)
    gain = beta * (logprobs - ref_logprobs.detach() - z0.detach())
    losses = 1.0 - torch.where(is_desirable, gain, -gain).sigmoid()
    return torch.where(is_desirable, desirable_weight * losses, undesirable_weight * losses)


def kto_reference_point(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return KTO's z0 (arXiv:2402.01306, section 4.1): a cheap, biased estimate of KL(policy || reference).

        z0 = max(0, mean_i (logprobs_i - ref_logprobs_i)),   for prompts x_i with completions of other prompts

    Args:
        logprobs, ref_logprobs: [B] floating, summed over the tokens of each mismatched completion.

    Returns:
        A scalar in nats per completion, at least 0.
    """
    _check_pairs(logprobs, ref_logprobs)
    return (logprobs - ref_logprobs).mean().clamp(min=0.0)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
    """Return the negative log-likelihood of the preference under Bradley and Terry's model (1952), for reward models.

        loss = -log sigmoid(chosen - rejected - margin)      (margin: Llama 2, arXiv:2307.09288, eq. 2)

    Args:
        chosen, rejected: [B] floating, the reward model's scores.
        margin: [B] or a number, by how much the chosen score should be larger; None: 0.

    Returns:
        [B], at least 0.
    """
    _check_pairs(chosen, rejected)
    difference = chosen - rejected
    return -logsigmoid(difference if margin is None else difference - margin)


def best_and_worst(rewards: Tensor, *, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each group's best and worst completion as a pair (on-policy DPO; arXiv:2402.04792 for groups of 2).

    Of equal rewards, the first is taken. A group of equal rewards, or with fewer than two counted ones, has no pair.

    Args:
        rewards: [B], row = prompt * group_size + member; nan is not counted.
        group_size: completions of each prompt, at least 2.

    Returns:
        (best [P] int64, worst [P] int64, is_pair [P] bool): row numbers, and whether the rewards differ.

    Raises:
        ValueError: for a group of 1.
    """
    if group_size < 2:
        raise ValueError(f"a pair needs a group_size of at least 2, got {group_size}")
    groups = rewards.reshape(-1, group_size)
    high, best = torch.where(groups.isnan(), -torch.inf, groups).max(dim=-1)
    low, worst = torch.where(groups.isnan(), torch.inf, groups).min(dim=-1)
    first = torch.arange(len(groups), device=rewards.device) * group_size
    return first + best, first + worst, high > low


def _log_odds(mean: Tensor) -> Tensor:
    """Return log(p / (1 - p)) for p = e^mean; p is kept just below 1, where the odds would be infinite."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


def _margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Return h of the module's docstring, [B]."""
    _check_pairs(chosen, rejected, ref_chosen, ref_rejected)
    return (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())


def _check_pairs(*logprobs: Tensor) -> None:
    """Raise `ValueError` for tensors that are not all [B] of the same length."""
    shapes = [list(x.shape) for x in logprobs]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 1:
        raise ValueError(f"pairs must all be [B], one number for each completion, got {shapes}")


def _check_beta(beta: float) -> None:
    """Raise `ValueError` for a beta that is not positive and finite."""
    if not (beta > 0.0 and beta < torch.inf):
        raise ValueError(f"beta must be greater than 0 and finite (0.1 is usual), got {beta}")
