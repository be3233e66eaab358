"""The formulas of rlft.functional written as loops over Python floats, slow and plain, one token at a time.

Everything takes and returns nested lists; a gradient is written out by hand, so that autograd is checked as well.
"""

from __future__ import annotations

import math

Rows = list[list[float]]
Mask = list[list[bool]]


def gae(rewards: Rows, values: Rows, mask: Mask, gamma: float, lam: float) -> tuple[Rows, Rows]:
    """A_t as the definition's sum, sum_l (gamma lam)^l delta_{t+l}, over the row's counted tokens."""
    advantages = [[0.0] * len(row) for row in rewards]
    returns = [[0.0] * len(row) for row in rewards]
    for i, row in enumerate(mask):
        counted = [t for t, keep in enumerate(row) if keep]
        deltas = []
        for n, t in enumerate(counted):
            following = values[i][counted[n + 1]] if n + 1 < len(counted) else 0.0
            deltas.append(rewards[i][t] + gamma * following - values[i][t])
        for n, t in enumerate(counted):
            advantages[i][t] = sum((gamma * lam) ** ell * delta for ell, delta in enumerate(deltas[n:]))
            returns[i][t] = advantages[i][t] + values[i][t]
    return advantages, returns


def discounted_returns(rewards: Rows, mask: Mask, gamma: float) -> Rows:
    """R_t as the definition's sum, sum_l gamma^l r_{t+l}, over the row's counted tokens."""
    returns = [[0.0] * len(row) for row in rewards]
    for i, row in enumerate(mask):
        counted = [t for t, keep in enumerate(row) if keep]
        for n, t in enumerate(counted):
            returns[i][t] = sum(gamma**ell * rewards[i][later] for ell, later in enumerate(counted[n:]))
    return returns


def group_advantages(rewards: list[float], group_size: int, kind: str, eps: float = 1e-4) -> list[float]:
    """kind: mean, zscore or leave_one_out; nan rewards are not counted and get 0."""
    advantages = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        for member, reward in enumerate(group):
            others = [r for j, r in enumerate(group) if j != member and not math.isnan(r)]
            if math.isnan(reward) or (not others and kind != "mean"):
                advantages.append(0.0)
                continue
            counted = [*others, reward]
            mean = sum(counted) / len(counted)
            if kind == "mean":
                advantages.append(reward - mean)
            elif kind == "leave_one_out":
                advantages.append(reward - sum(others) / len(others))
            else:
                std = math.sqrt(sum((r - mean) ** 2 for r in counted) / (len(counted) - 1))
                advantages.append((reward - mean) / (std + eps))
    return advantages


def whiten(x: Rows, mask: Mask, shift_mean: bool) -> Rows:
    """Two passes over the counted entries; var with ddof 1."""
    counted = [v for row, keep in zip(x, mask, strict=True) for v, k in zip(row, keep, strict=True) if k]
    mean = sum(counted) / len(counted)
    variance = sum((v - mean) ** 2 for v in counted) / (len(counted) - 1) if len(counted) > 1 else 0.0
    shift = 0.0 if shift_mean else mean
    return [
        [(v - mean) / math.sqrt(variance + 1e-8) + shift if k else 0.0 for v, k in zip(row, keep, strict=True)]
        for row, keep in zip(x, mask, strict=True)
    ]


def aggregate(x: Rows, mask: Mask, kind: str, length: float = 1.0) -> float:
    """kind: token_mean, sequence_mean, sequence_sum or constant."""
    sums, counts = [], []
    for row, keep in zip(x, mask, strict=True):
        counted = [v for v, k in zip(row, keep, strict=True) if k]
        sums.append(sum(counted))
        counts.append(len(counted))
    if kind == "token_mean":
        return sum(sums) / sum(counts) if sum(counts) else 0.0
    if kind == "sequence_mean":
        return sum(s / n for s, n in zip(sums, counts, strict=True) if n) / len(x)
    return sum(sums) / len(x) / (length if kind == "constant" else 1.0)


def clipped(
    logprob: float, old: float, advantage: float, low: float, high: float, dual: float | None
) -> tuple[float, float]:
    """One token: the loss and its derivative by logprob (that of exp(logprob - old) is itself)."""
    ratio = math.exp(logprob - old)
    if advantage >= 0:
        is_clipped, bound = ratio > 1 + high, 1 + high
    else:
        is_clipped, bound = ratio < 1 - low, 1 - low
        if dual is not None and ratio > dual:
            is_clipped, bound = True, dual
    return (-bound * advantage, 0.0) if is_clipped else (-ratio * advantage, -ratio * advantage)


def cispo(logprob: float, old: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """One token: the loss and its derivative by logprob; the weight is a constant."""
    weight = min(max(math.exp(logprob - old), low), high)
    return -weight * advantage * logprob, -weight * advantage


def sequence_ratio(
    logprobs: list[float], old: list[float], advantage: float, low: float, high: float
) -> tuple[float, float]:
    """One sequence: the loss at each token, and the derivative of their mean by each logprob."""
    length = len(logprobs)
    ratio = math.prod(math.exp(a - b) for a, b in zip(logprobs, old, strict=True)) ** (1 / length)
    bound = 1 + high if advantage >= 0 else 1 - low
    if (advantage >= 0 and ratio > bound) or (advantage < 0 and ratio < bound):
        return -bound * advantage, 0.0
    return -ratio * advantage, -ratio * advantage / length


def value_clipped(value: float, old: float, target: float, clip: float) -> tuple[float, float]:
    """One token: the loss and its derivative by value."""
    bounded = min(max(value, old - clip), old + clip)
    plain, alternative = (value - target) ** 2, (bounded - target) ** 2
    if alternative > plain:
        return 0.5 * alternative, 0.0  # the clamp is active where the two differ
    return 0.5 * plain, value - target


def token_logprob(logits: list[float], token: int) -> tuple[float, float]:
    """The logprob of `token` and the entropy, from one row of logits."""
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    total = sum(weights)
    logps = [z - top - math.log(total) for z in logits]
    return logps[token], -sum(w / total * logp for w, logp in zip(weights, logps, strict=True))


def categorical_kl(logits: list[float], ref_logits: list[float]) -> float:
    """KL(softmax(logits) || softmax(ref_logits)), entries without mass left out."""
    pairs = [(token_logprob(logits, v)[0], token_logprob(ref_logits, v)[0]) for v in range(len(logits))]
    return sum(math.exp(p) * (p - q) for p, q in pairs if math.exp(p) > 0)
