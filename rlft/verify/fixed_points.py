"""Fixed points: the policy at which an algorithm's expected gradient is 0, which need not maximise E[r] - beta KL.

On a task whose completions have one length, every aggregation multiplies by a constant. Up to that constant, the
expected gradient of an algorithm with its KL in the loss is

    sum over y of p(y) A(y) grad log p(y) - coef sum over contexts c of rho(c) grad D(c)

A(y) is the mean weight of a completion in a group with k - 1 others drawn from the policy, by the papers' formulas
(`token_weights`), over all multisets of the others' rewards; rho(c) is how often the policy visits c; D is
KL(pi || ref) of the next token for k2, KL(ref || pi) for k3. Whitening and BNPO's fit are taken over an infinite batch.
With the KL in the reward the fixed point is pi* itself: there r - beta log pi/ref is constant, so advantages are 0.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import torch
from torch import Tensor

from rlft.verify import exact, token_weights
from rlft.verify.enumerable import Task
from rlft.verify.formulas import Formula
from rlft.verify.policy import TabularPolicy
from rlft.verify.token_weights import Settings

STEPS, RATE = 300, 0.1


def climb(
    formula: Formula, node: Settings, task: Task, policy: TabularPolicy, reference: TabularPolicy, *, group_size: int
) -> None:
    """Move the policy, by Adam, to where the expected gradient of `formula` is 0."""
    values = sorted(set(task.rewards.flatten().tolist()))
    which = torch.searchsorted(torch.tensor(values, dtype=torch.float64), task.rewards[0])  # [N]
    table = Weights(formula, node, values, group_size)
    optimizer = torch.optim.Adam([policy.table], lr=RATE, betas=(0.9, 0.99))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1.0 - step / STEPS)
        whole = exact.logprobs(policy, task)[0]
        chance = whole.exp().detach()
        advantage = table.expected(torch.zeros(len(values), dtype=torch.float64).index_add(0, which, chance))[which]
        forwards, backwards = exact.token_kls(policy, reference)
        held = (exact.visits(task, chance) * (backwards if formula.kl == "k3" else forwards)).sum()
        loss = node["kl"]["coef"] * held - (chance * advantage * whole).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Weights:
    """The mean weight of a completion with each reward, given the probability of each reward."""

    def __init__(self, formula: Formula, settings: Settings, values: list[float], group_size: int) -> None:
        """`values` are all rewards that a completion can have."""
        self.formula, self.settings, self.values, self.group_size = formula, settings, values, group_size
        self.others = list(itertools.combinations_with_replacement(range(len(values)), group_size - 1))
        self.ways = torch.tensor([_ways(other) for other in self.others], dtype=torch.float64)  # orders of each
        groups = [[[v, *(values[i] for i in other)] for other in self.others] for v in values]
        if formula.advantage != "beta":
            weights = token_weights.OF_A_GROUP[formula.advantage]
            made = [[_first(weights(g, settings["advantage"]), g) for g in row] for row in groups]
            self.fixed = torch.tensor(made, dtype=torch.float64)  # [values, multisets]

    def expected(self, chances: Tensor) -> Tensor:
        """Return [values] from the probability of each reward, [values]."""
        of_others = self.ways * torch.stack([chances[list(other)].prod() for other in self.others])
        if self.formula.advantage == "beta":
            return self._beta(chances) @ of_others
        mean = self.fixed @ of_others
        if not self.formula.is_whitened:
            return mean
        square = ((self.fixed**2) @ of_others) @ chances
        return mean / (square - (mean @ chances) ** 2).sqrt()

    def _beta(self, chances: Tensor) -> Tensor:
        """BNPO's weights when the Beta distribution is fitted to infinitely many groups: strength k - 1."""
        rate, strength = float(chances[1]), self.group_size - 1.0
        alpha, beta = 1.0 + rate * strength / 3.0, 1.0 + (1.0 - rate) * strength / 3.0
        norm = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
        rows = []
        for v in self.values:
            shares = [(v + sum(self.values[i] for i in other)) / self.group_size for other in self.others]
            density = [p ** (alpha - 1.0) * (1.0 - p) ** (beta - 1.0) / norm for p in shares]
            rows.append([(v - p) / f if 0.0 < p < 1.0 else 0.0 for p, f in zip(shares, density, strict=True)])
        return torch.tensor(rows, dtype=torch.float64)


def _first(made: list[float], group: list[float]) -> float:
    """Return the first member's weight, averaged over all members with its reward: their order is random."""
    equals = [w for w, r in zip(made, group, strict=True) if r == group[0]]
    return sum(equals) / len(equals)


def _ways(multiset: tuple[int, ...]) -> float:
    return math.factorial(len(multiset)) / math.prod(math.factorial(n) for n in Counter(multiset).values())
