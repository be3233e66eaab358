"""The weight of a token or a completion in the policy gradient, by the papers' formulas, in plain Python.

Nothing here comes from rlft.functional, which is checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]


def discounted(rewards: list[float], gamma: float) -> list[float]:
    """R_t = sum_s gamma^s r_(t+s) (Williams, 1992)."""
    return [sum(gamma**s * r for s, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_s (gamma lam)^s delta_(t+s) (Schulman et al., arXiv:1506.02438, eq. 16)."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    return discounted(deltas, gamma * lam)


def group_returns(rewards: list[list[float]], group_size: int, gamma: float) -> list[list[float]]:
    """A_it = R_it minus the mean of R_jt over the others of the group that are long enough: leave one out at each t."""
    returns = [discounted(row, gamma) for row in rewards]
    made = []
    for i, row in enumerate(returns):
        start = i - i % group_size
        others = [returns[j] for j in range(start, start + group_size) if j != i]
        bases = [[other[t] for other in others if len(other) > t] for t in range(len(row))]
        made.append([r - (sum(base) / len(base) if base else 0.0) for r, base in zip(row, bases, strict=True)])
    return made


def whitened(rows: list[list[float]]) -> list[list[float]]:
    """(A - mean) / sqrt(var + 1e-8) over all tokens, var with n - 1 (as TRL's PPO)."""
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def of_groups(kind: str, groups: list[list[float]], greedy: list[float], settings: Settings) -> list[float]:
    """Return one weight for each completion, from the scores of the batch's groups and each prompt's greedy score."""
    if kind == "greedy":  # ReMax, arXiv:2310.10505
        return [score - base for group, base in zip(groups, greedy, strict=True) for score in group]
    if kind == "beta":
        return _beta(groups)
    return [weight for group in groups for weight in OF_A_GROUP[kind](group, settings)]


def mean(group: list[float], settings: Settings) -> list[float]:
    """Dr. GRPO, arXiv:2503.20783."""
    return [r - sum(group) / len(group) for r in group]


def zscore(group: list[float], settings: Settings) -> list[float]:
    """GRPO, arXiv:2402.03300; n - 1 and eps as in TRL."""
    centred = mean(group, settings)
    deviation = math.sqrt(sum(x**2 for x in centred) / (len(group) - 1))
    return [x / (deviation + settings["eps"]) for x in centred]


def leave_one_out(group: list[float], settings: Settings) -> list[float]:
    """RLOO, arXiv:2402.14740."""
    return [r - sum(group[:i] + group[i + 1 :]) / (len(group) - 1) for i, r in enumerate(group)]


def best(group: list[float], settings: Settings) -> list[float]:
    """RAFT, arXiv:2304.06767: 1 for the first of the best, 0 for all others, and for a group of equals."""
    if max(group) == min(group):
        return [0.0] * len(group)
    return [float(i == group.index(max(group))) for i in range(len(group))]


def softmax(group: list[float], settings: Settings) -> list[float]:
    """Reward-weighted regression, Peters and Schaal (2007), with the group as the sample: weights average to 1."""
    grown = [math.exp((r - max(group)) / settings["beta"]) for r in group]
    return [len(group) * x / sum(grown) for x in grown]


OF_A_GROUP: dict[str, Callable[[list[float], Settings], list[float]]] = {
    f.__name__: f for f in (mean, zscore, leave_one_out, best, softmax)
}


def _beta(groups: list[list[float]]) -> list[float]:
    """BNPO, arXiv:2506.02864, sections 3.2 and 3.3: (r - p) / f(p; 1 + a/3, 1 + b/3), a and b from the batch's p."""
    rates = [sum(group) / len(group) for group in groups]
    centre = sum(rates) / len(rates)
    variance = sum((p - centre) ** 2 for p in rates) / (len(rates) - 1) if len(rates) > 1 else 0.0
    if not 0.0 < variance < centre * (1.0 - centre):
        return [r - p for group, p in zip(groups, rates, strict=True) for r in group]
    strength = centre * (1.0 - centre) / variance - 1.0
    alpha, beta = 1.0 + centre * strength / 3.0, 1.0 + (1.0 - centre) * strength / 3.0
    norm = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
    made = []
    for group, p in zip(groups, rates, strict=True):
        density = p ** (alpha - 1.0) * (1.0 - p) ** (beta - 1.0) / norm
        made += [(r - p) / density if 0.0 < p < 1.0 else 0.0 for r in group]
    return made


def is_clipped(ratio: float, advantage: float, low: float, high: float, dual: float | None = None) -> bool:
    """Whether min(r A, clamp(r) A) is constant: PPO, arXiv:1707.06347, eq. 7; dual clip, arXiv:1912.09729, eq. 5."""
    if advantage >= 0:
        return ratio > 1.0 + high
    return ratio < 1.0 - low or (dual is not None and ratio > dual)
