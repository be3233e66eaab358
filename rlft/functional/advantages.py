"""Advantages: how much better than expected each token or each completion was.

There are two families. From per-token rewards [B, T]: discounted returns, and generalised advantage estimation with a
critic. From one reward for each completion [B], with the rows of a group next to each other (row = prompt * group_size
+ member): group mean, group z-score and leave-one-out. `whiten` is for both. Padding never enters an advantage.

A reward of nan means that the completion is not counted (its reward function returned None): it is left out of the
group's mean, standard deviation and leave-one-out mean, and its own advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.functional.masking import as_bool, require_same_shape, zero_outside
from rlft.functional.shapes import PerCompletion, PerToken


def gae(rewards: PerToken, values: PerToken, mask: PerToken, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and the critic's targets (arXiv:1506.02438, eq. 16); neither is whitened.

        delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1};   return_t = A_t + V_t

    t + 1 is the next counted token of the row: tokens outside the mask are skipped. After the last counted token,
    V = A = 0, for truncated completions too (as in TRL).

    Args:
        rewards: [B, T] floating.
        values: [B, T] floating; V_t is the value of the state before token t is sampled.
        mask: [B, T] bool or float.
        gamma: discount, in [0, 1].
        lam: in [0, 1]; 0 gives the one-step temporal difference, 1 gives returns minus values.

    Returns:
        advantages and returns, both [B, T], 0 outside the mask.
    """
    _check_fraction("gamma", gamma)
    _check_fraction("lam", lam)
    require_same_shape(rewards=rewards, values=values)
    counted, rewards, values = as_bool(mask, rewards), zero_outside(rewards, mask), zero_outside(values, mask)
    advantage = next_value = torch.zeros_like(rewards[:, 0] + values[:, 0]) if rewards.shape[1] else rewards.sum(-1)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(counted[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counted[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.where(counted, torch.stack(columns[::-1], dim=1), 0.0) if columns else torch.zeros_like(rewards)
    return advantages, advantages + values


def discounted_returns(rewards: PerToken, mask: PerToken, *, gamma: float) -> Tensor:
    """Return the discounted sum of the rewards from each token onwards (REINFORCE's return-to-go).

        R_t = r_t + gamma R_{t+1}

    t + 1 is the next counted token of the row; the same as `gae` with zero values and lam = 1.

    Args:
        rewards: [B, T] floating.
        mask: [B, T] bool or float.
        gamma: discount, in [0, 1].

    Returns:
        [B, T], 0 outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def group_mean(rewards: PerCompletion, *, group_size: int) -> Tensor:
    """Return each reward minus its group's mean (Dr. GRPO, arXiv:2503.20783).

        A_i = r_i - mean(r)

    The mean includes r_i itself, so for k completions the expected gradient is (k - 1) / k of that of `leave_one_out`,
    and 0 for k = 1.

    Args:
        rewards: [B], row = prompt * group_size + member; nan is not counted.
        group_size: completions of each prompt.

    Returns:
        [B], exactly 0 throughout a group of equal rewards.
    """
    return centre_groups(rewards, group_size)[0].flatten()


def group_zscore(rewards: PerCompletion, *, group_size: int, eps: float = 1e-4) -> Tensor:
    """Return (reward - group's mean) / group's standard deviation (GRPO, arXiv:2402.03300, eq. 3).

        A_i = (r_i - mean(r)) / (std(r) + eps),   std with ddof 1, as in TRL

    Args:
        rewards: [B], row = prompt * group_size + member; nan is not counted.
        group_size: completions of each prompt, at least 2.
        eps: added to the standard deviation.

    Returns:
        [B], exactly 0 throughout a group of equal rewards, and where only one completion of the group counts.

    Raises:
        ValueError: for a group of 1, which has no standard deviation.
    """
    refuse_group_of_one("group_zscore", group_size)
    centred, num = centre_groups(rewards, group_size)
    std = (centred.square().sum(-1, keepdim=True) / (num - 1).clamp(min=1)).sqrt()
    return (centred / (std + eps)).flatten()


def leave_one_out(rewards: PerCompletion, *, group_size: int) -> Tensor:
    """Return each reward minus the mean of the other rewards of its group (RLOO, arXiv:2402.14740).

        A_i = r_i - sum_{j != i} r_j / (k - 1)

    The baseline does not depend on r_i, so the gradient is unbiased.

    Args:
        rewards: [B], row = prompt * group_size + member; nan is not counted.
        group_size: completions of each prompt, at least 2.

    Returns:
        [B], exactly 0 throughout a group of equal rewards, and where only one completion of the group counts.

    Raises:
        ValueError: for a group of 1, which has no other rewards.
    """
    refuse_group_of_one("leave_one_out", group_size)
    centred, num = centre_groups(rewards, group_size)
    return (centred * num / (num - 1).clamp(min=1)).flatten()


def no_advantage(rewards: PerCompletion) -> Tensor:
    """Return zeros `[B]`: the rewards train nothing (on-policy distillation, where the KL to a teacher trains)."""
    return torch.zeros_like(rewards)


def greedy_baseline(rewards: PerCompletion, greedy_rewards: PerCompletion) -> Tensor:
    """Return each reward minus the reward of its prompt's greedy completion (ReMax, arXiv:2310.10505, eq. 6).

        A_i = r_i - r_greedy

    The baseline does not depend on the sample, so the gradient is unbiased for groups of any size.

    Args:
        rewards: [B]; nan is not counted.
        greedy_rewards: [B], of the greedy completion of each row's prompt; a row where it is nan is not counted.

    Returns:
        [B], 0 where not counted.
    """
    require_same_shape(rewards=rewards, greedy_rewards=greedy_rewards)
    return (rewards - greedy_rewards).nan_to_num(0.0)


def beta_normalized(rewards: PerCompletion, *, group_size: int) -> Tensor:
    """Return BNPO's advantages for rewards of 0 and 1 (arXiv:2506.02864, sections 3.2 and 3.3).

        A_i = (r_i - p) / f(p; 1 + a/3, 1 + b/3),   p = mean(r) of the group, f the density of a Beta distribution

    a and b are the parameters of the Beta distribution with the mean and the (ddof 1) variance of p over the groups of
    the batch. If there is no such distribution (one group, or all p equal), f is 1, which gives `group_mean`.

    Args:
        rewards: [B] of 0 and 1, row = prompt * group_size + member; nan is not counted.
        group_size: completions of each prompt, at least 2.

    Returns:
        [B], exactly 0 throughout a group of equal rewards.

    Raises:
        ValueError: for rewards other than 0 and 1, and for a group of 1.
    """
    refuse_group_of_one("beta_normalized", group_size)
    is_other = (rewards != 0) & (rewards != 1) & ~rewards.isnan()
    if is_other.any():
        raise ValueError(
            f"beta_normalized is for rewards of 0 and 1, got {float(rewards[is_other][0]):.6g}; for others take "
            f"group_zscore or leave_one_out"
        )
    centred, num = centre_groups(rewards, group_size)
    p = rewards.reshape(-1, group_size).nan_to_num(0.0).sum(-1, keepdim=True) / num.clamp(min=1)
    counted = p[num > 0]
    mean, variance = counted.mean(), counted.var() if len(counted) > 1 else torch.zeros_like(p[0, 0])
    if variance <= 0 or variance >= mean * (1 - mean):
        return centred.flatten()
    strength = mean * (1 - mean) / variance - 1
    alpha, beta = 1 + mean * strength / 3, 1 + (1 - mean) * strength / 3
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    inside = p.clamp(1e-6, 1 - 1e-6)  # at p = 0 and 1 the density may be 0; there r - p is 0 too
    density = ((alpha - 1) * inside.log() + (beta - 1) * torch.log1p(-inside) - log_norm).exp()
    return (centred / density).flatten()


def group_returns(rewards: PerToken, mask: PerToken, *, group_size: int, gamma: float) -> Tensor:
    """Return each token's discounted return minus the mean of the group's other members at the same position.

        A_{i,t} = R_{i,t} - mean_{j != i, j still runs at t} R_{j,t},   R_t = r_t + gamma R_{t+1}

    This is `leave_one_out` for per-token rewards. The other members' returns do not depend on the tokens of member i,
    so the gradient is unbiased, although the contexts differ from the second token on. At a position that no other
    member reaches, the baseline is 0.

    Args:
        rewards: [B, T] floating, row = prompt * group_size + member.
        mask: [B, T] bool or float.
        group_size: completions of each prompt, at least 2.
        gamma: discount, in [0, 1]; with 0, a token is credited only with its own reward.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: for a group of 1.
    """
    refuse_group_of_one("group_returns", group_size)
    if rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} rows do not make whole groups of {group_size}")
    returns, counted = discounted_returns(rewards, mask, gamma=gamma), as_bool(mask, rewards)
    groups, runs = returns.view(-1, group_size, rewards.shape[1]), counted.view(-1, group_size, rewards.shape[1])
    others = groups.sum(1, keepdim=True) - groups
    num_others = runs.sum(1, keepdim=True) - runs.to(torch.int64)
    advantages = groups - others / num_others.clamp(min=1)
    return torch.where(counted, advantages.view_as(rewards), 0.0)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Return `x` scaled to unit variance over the counted entries of the whole tensor.

        (x - mean) / sqrt(var + 1e-8)  (+ mean, if not shift_mean),   var unbiased (ddof 1)

    As in TRL's PPO. The statistics are those of this tensor, so it must be the whole batch, not a micro-batch.

    Args:
        x: [B, T] floating.
        mask: [B, T] bool or float.
        shift_mean: whether the mean becomes 0; if not, it is unchanged.

    Returns:
        [B, T], 0 outside the mask; a single counted entry has variance 0.
    """
    counted = as_bool(mask, x)
    num = counted.sum()
    mean = zero_outside(x, counted).sum() / num.clamp(min=1)
    centred = zero_outside(x - mean, counted)
    variance = centred.square().sum() / (num - 1).clamp(min=1)
    scaled = centred * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else zero_outside(scaled + mean, counted)


def centre_groups(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return rewards minus their group's mean, [P, G], 0 where not counted, and the number of counted ones, [P, 1]."""
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [B], one for each completion, got {list(rewards.shape)}")
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"{rewards.shape[0]} rewards do not make whole groups of {group_size}: "
            "rows must be prompts x group_size, with group_size at least 1"
        )
    groups = (rewards if rewards.is_floating_point() else rewards.float()).reshape(-1, group_size)
    counted = ~groups.isnan()
    num = counted.sum(-1, keepdim=True)
    # Subtracting a member first makes groups of equal rewards exactly 0; r - mean(r) alone would leave rounding errors.
    lowest = torch.where(counted, groups, torch.inf).amin(-1, keepdim=True)
    above = torch.where(counted, groups - lowest, 0.0)
    mean = above.sum(-1, keepdim=True) / num.clamp(min=1)
    return torch.where(counted, above - mean, 0.0), num


def refuse_group_of_one(name: str, group_size: int) -> None:
    """Raise `ValueError` for a group of one completion, which cannot be compared with others."""
    if group_size == 1:
        raise ValueError(
            f"{name} compares a completion with the others of its group and needs group_size of at least 2, got 1; "
            "raise group_size, or choose an advantage that needs no group (returns-to-go, a critic)"
        )


def _check_fraction(name: str, value: float) -> None:
    """Raise `ValueError` for a discount outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
