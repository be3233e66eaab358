"""Gradients by hand: the papers' formulas as plain loops over the tokens of a table policy, without autograd.

Nothing here comes from rlft.functional or rlft.algos, which are checked against it. The policy is
p(v | c) = softmax(z[c] / temperature)[v], so d log p(a | c) / d z[c, v] = (1[v = a] - p(v | c)) / temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlft.verify import token_weights

Array = np.ndarray


@dataclass(frozen=True)
class Formula:
    """The formulas that an algorithm's paper combines.

    Arguments:
        advantage: of tokens: return, baseline, gae or group_return; of completions in their group: mean, zscore,
            leave_one_out, greedy, beta, best or softmax; or none.
        surrogate: score, clipped, cispo, sequence (GSPO) or sapo.
        aggregation: token_mean, sequence_mean, sequence_sum or constant.
        kl: none, reward (k1), or k2, k3, exact in the loss.
        is_whitened: whether advantages are whitened over the tokens of the batch.
    """

    advantage: str
    surrogate: str
    aggregation: str
    kl: str
    is_whitened: bool = False


@dataclass(frozen=True)
class Sample:
    """A completion: the table's row, the id and the reward of each token, and the reward of the greedy completion."""

    contexts: tuple[int, ...]
    tokens: tuple[int, ...]
    rewards: tuple[float, ...]
    greedy_reward: float = 0.0


@dataclass
class Tables:
    """Everything that is trained. A critic's value of a context is trunk[c] @ weight + bias.

    The trunk is the table `critic`, or the policy's where that is None; without a value head `weight` is None as well.
    """

    policy: Array  # [contexts, V] logits
    critic: Array | None = None  # [contexts, V]
    weight: Array | None = None  # [V]
    bias: float = 0.0

    def value(self, context: int) -> float:
        return float(self.trunk[context] @ self.weight + self.bias)

    @property
    def trunk(self) -> Array:
        return self.policy if self.critic is None else self.critic

    def moved(self, gradient: Tables, rate: float) -> Tables:
        """Return the tables after a plain gradient step."""
        return Tables(
            self.policy - rate * gradient.policy,
            None if self.critic is None or gradient.critic is None else self.critic - rate * gradient.critic,
            None if self.weight is None or gradient.weight is None else self.weight - rate * gradient.weight,
            self.bias - rate * gradient.bias,
        )

    def flat(self) -> Array:
        """Return all numbers as one vector, the policy's first."""
        parts = [self.policy] if self.critic is None else [self.policy, self.critic]
        parts += [] if self.weight is None else [self.weight, np.array([self.bias])]
        return np.concatenate([x.ravel() for x in parts])


@dataclass(frozen=True)
class ByHand:
    """One algorithm's gradient on one batch, by loops.

    Arguments:
        formula: the algorithm's.
        settings: its composed YAML, for the constants.
        old: [contexts, V] logits of the policy that samples. reference: [contexts, V] logits.
        temperature: divides both.
        length: the largest number of new tokens.
        baseline: the running mean of REINFORCE's rewards.
    """

    formula: Formula
    settings: dict[str, Any]
    old: Array
    reference: Array
    temperature: float
    length: int
    baseline: float = 0.0

    def advantages(self, groups: list[list[Sample]], critic: Tables) -> tuple[list[list[float]], list[list[float]]]:
        """Return the advantages and the critic's targets of each token of each row, under the tables that sampled."""
        f, s = self.formula, self.settings
        logp, logq = log_softmax(self.old, self.temperature), log_softmax(self.reference, self.temperature)
        coef = s["kl"]["coef"] if f.kl == "reward" else 0.0
        rewards = []  # of each token, minus the penalty
        for sample in (sample for group in groups for sample in group):
            steps = zip(sample.contexts, sample.tokens, sample.rewards, strict=True)
            rewards.append([r - coef * float(logp[c, a] - logq[c, a]) for c, a, r in steps])
        targets: list[list[float]] = [[] for _ in rewards]
        if f.advantage in ("return", "baseline"):
            made = [token_weights.discounted(row, s["advantage"]["gamma"]) for row in rewards]
            made = [[value - self.baseline for value in row] for row in made] if f.advantage == "baseline" else made
        elif f.advantage == "gae":
            rows = [sample for group in groups for sample in group]
            values = [[critic.value(c) for c in sample.contexts] for sample in rows]
            gamma, lam = s["advantage"]["gamma"], s["advantage"]["lam"]
            made = [token_weights.gae(row, v, gamma, lam) for row, v in zip(rewards, values, strict=True)]
            targets = [[a + v for a, v in zip(x, y, strict=True)] for x, y in zip(made, values, strict=True)]
        elif f.advantage == "group_return":
            made = token_weights.group_returns(rewards, len(groups[0]), s["advantage"]["gamma"])
        elif f.advantage == "none":
            made = [[0.0] * len(row) for row in rewards]
        else:
            size = len(groups[0])
            scores = [sum(row) for row in rewards]
            greedy = [group[0].greedy_reward for group in groups]
            grouped = [scores[i : i + size] for i in range(0, len(scores), size)]
            flat = token_weights.of_groups(f.advantage, grouped, greedy, s["advantage"])
            made = [[a] * len(row) for a, row in zip(flat, rewards, strict=True)]
        return (token_weights.whitened(made) if f.is_whitened else made), targets

    def gradient(self, groups: list[list[Sample]], first: Tables, now: Tables) -> tuple[Tables, float]:
        """Return the gradient of the loss at `now` for a batch sampled by `first`, and the share of clipped tokens.

        At the first update on a batch, `now` is `first`.
        """
        rows = [sample for group in groups for sample in group]
        advantages, targets = self.advantages(groups, first)
        num_tokens = sum(len(sample.tokens) for sample in rows)
        logp, old = log_softmax(now.policy, self.temperature), log_softmax(self.old, self.temperature)
        logq = log_softmax(self.reference, self.temperature)
        grad, clipped = np.zeros_like(now.policy), 0
        for sample, row in zip(rows, advantages, strict=True):
            share = self._share(len(sample.tokens), len(rows), num_tokens)
            pairs = list(zip(sample.contexts, sample.tokens, strict=True))
            slopes, cut = self._slopes([float(logp[c, a] - old[c, a]) for c, a in pairs], row)
            clipped += cut
            for (c, a), slope in zip(pairs, slopes, strict=True):
                d = float(logp[c, a] - logq[c, a])
                slope += self._kl_coef * {"k2": d, "k3": 1.0 - math.exp(-d)}.get(self.formula.kl, 0.0)
                p = np.exp(logp[c])
                one_hot = np.eye(len(p))[a]
                grad[c] += share * slope * (one_hot - p) / self.temperature
                if self.formula.kl == "exact":
                    ratio = logp[c] - logq[c]
                    grad[c] += share * self._kl_coef * p * (ratio - p @ ratio) / self.temperature
                entropy = -(p @ logp[c])
                grad[c] += share * self.settings["entropy_coef"] * p * (logp[c] + entropy) / self.temperature
        made = Tables(grad)
        if self.formula.advantage == "gae":
            made = self._with_values(grad, rows, targets, first, now)
        return made, clipped / num_tokens

    @property
    def _kl_coef(self) -> float:
        return self.settings["kl"]["coef"]

    def _share(self, length: int, num_rows: int, num_tokens: int) -> float:
        """Return the aggregation's factor for each token of a completion of `length` tokens."""
        return {
            "token_mean": 1.0 / num_tokens,
            "sequence_mean": 1.0 / (length * num_rows),
            "sequence_sum": 1.0 / num_rows,
            "constant": 1.0 / (self.length * num_rows),
        }[self.formula.aggregation]

    def _slopes(self, log_ratios: list[float], advantages: list[float]) -> tuple[list[float], int]:
        """Return d loss / d logprob of each token of a completion, and how many tokens are clipped."""
        s = self.settings["surrogate"]
        if self.formula.surrogate == "score":
            return [-a for a in advantages], 0
        if self.formula.surrogate == "sequence":  # one ratio for all tokens: the sequence's, to the power 1 / length
            ratio = math.exp(sum(log_ratios) / len(log_ratios))
            is_cut = token_weights.is_clipped(ratio, advantages[0], s["clip_low"], s["clip_high"])
            return [0.0 if is_cut else -ratio * a for a in advantages], len(advantages) * is_cut
        slopes, cut = [], 0
        for log_ratio, a in zip(log_ratios, advantages, strict=True):
            ratio = math.exp(log_ratio)
            if self.formula.surrogate == "cispo":
                cut += ratio > s["clip_high"]
                slopes.append(-min(ratio, s["clip_high"]) * a)
            elif self.formula.surrogate == "sapo":
                gate = 1.0 / (1.0 + math.exp(-(s["tau_pos"] if a > 0 else s["tau_neg"]) * (ratio - 1.0)))
                slopes.append(-4.0 * gate * (1.0 - gate) * ratio * a)
            else:
                is_cut = token_weights.is_clipped(ratio, a, s["clip_low"], s["clip_high"], s["dual_clip"])
                cut += is_cut
                slopes.append(0.0 if is_cut else -ratio * a)
        return slopes, cut

    def _with_values(
        self, policy: Array, rows: list[Sample], targets: list[list[float]], first: Tables, now: Tables
    ) -> Tables:
        """Return the gradient with that of value_coef max((V - R)^2, (clamp(V) - R)^2) / 2 added, mean over tokens."""
        assert now.weight is not None
        trunk, weight, bias = np.zeros_like(now.trunk), np.zeros_like(now.weight), 0.0
        num_tokens, clip = sum(len(sample.tokens) for sample in rows), self.settings["value_clip"]
        for sample, row in zip(rows, targets, strict=True):
            for c, target in zip(sample.contexts, row, strict=True):
                value, before = now.value(c), first.value(c)
                bounded = min(max(value, before - clip), before + clip)
                if (bounded - target) ** 2 > (value - target) ** 2:
                    continue  # the clamped error is the larger, and constant: no gradient
                slope = self.settings["value_coef"] * (value - target) / num_tokens
                trunk[c] += slope * now.weight
                weight += slope * now.trunk[c]
                bias += slope
        if now.critic is None:
            return Tables(policy + trunk, None, weight, bias)
        return Tables(policy, trunk, weight, bias)


def log_softmax(table: Array, temperature: float) -> Array:
    """Return log softmax(table / temperature) of each row."""
    z = table / temperature
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))
