"""Weights of the likelihood, made from rewards: best of n, and reward-weighted regression.

Used as the advantage in `score_function`, they give weighted maximum likelihood of the policy's own samples. Rows of a
group are next to each other (row = prompt * group_size + member); a completion with a reward of nan is not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.functional.advantages import centre_groups, refuse_group_of_one
from rlft.functional.shapes import PerCompletion


def best_of_group(rewards: PerCompletion, *, group_size: int) -> Tensor:
    """Return 1 for the best completion of each group and 0 for the others (RAFT, arXiv:2304.06767; best of n).

    Used as an advantage, it gives maximum likelihood of the best completions: expert iteration. Of equal rewards, the
    first is taken. A group of equal rewards has no best completion and gets zeros.

    Args:
        rewards: [B], row = prompt * group_size + member; nan is not counted.
        group_size: completions of each prompt, at least 2.

    Returns:
        [B] of 0 and 1.

    Raises:
        ValueError: for a group of 1.
    """
    refuse_group_of_one("best_of_group", group_size)
    centred, _ = centre_groups(rewards, group_size)
    ranked = torch.where(rewards.isnan(), -torch.inf, rewards).reshape(-1, group_size)
    best = torch.zeros_like(centred).scatter(-1, ranked.argmax(-1, keepdim=True), 1.0)
    return torch.where((centred != 0).any(-1, keepdim=True), best, 0.0).flatten()


def reward_weighted(rewards: PerCompletion, *, group_size: int, beta: float) -> Tensor:
    """Return reward-weighted regression's weights (Peters and Schaal, 2007; AWR, arXiv:1910.00177, eq. 8).

        w_i = G softmax(r / beta)_i   over the group, so that weights average to 1

    Used as an advantage, it gives weighted maximum likelihood. The target is pi exp(r / beta) / Z, which maximises the
    reward with a KL penalty of strength beta to the policy pi that sampled. A baseline in r cancels in the softmax.

    Args:
        rewards: [B], row = prompt * group_size + member; nan is not counted.
        group_size: completions of each prompt, at least 2.
        beta: temperature, in units of the reward; greater than 0.

    Returns:
        [B], at least 0; 0 where not counted.

    Raises:
        ValueError: for a group of 1, and for a beta that is not positive.
    """
    refuse_group_of_one("reward_weighted", group_size)
    if not beta > 0.0:
        raise ValueError(f"beta must be greater than 0, in units of the reward, got {beta}")
    _, num = centre_groups(rewards, group_size)
    scaled = torch.where(rewards.isnan(), -torch.inf, rewards / beta).reshape(-1, group_size)
    return (torch.softmax(scaled, dim=-1).nan_to_num(0.0) * num).flatten()
