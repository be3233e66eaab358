"""Expected gradients by listing every batch: all groups of completions that can be drawn, each with its probability.

Each batch goes through the real `collect` and `loss`, and its gradient is compared with that of the papers' formulas.
The sum over all batches, the expected gradient, is compared with the exact policy gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlft.algos.online.baselines import RunningBaseline
from rlft.core.batch import Batch
from rlft.models.heads import Critic, Head, ValueHead
from rlft.verify.cases import TEMPERATURE, Case, composed, settings_of
from rlft.verify.enumerable import Completion, Task
from rlft.verify.formulas import Array, ByHand, Sample, Tables, log_softmax
from rlft.verify.listed import Group, Listed, loss_of, rollout_of, sample_of
from rlft.verify.verdict import SAME, Row, same

BASELINE = 0.375  # the running mean of rewards, where a baseline uses it


@dataclass
class Expectation:
    """The results on one task, over all its batches."""

    num_batches: int
    real: list[Array]  # the expected gradient at the first and at the second update
    by_hand: list[Array]
    distance: list[float]  # the largest difference in any batch's gradient, over the largest entry of all gradients
    clipped: float  # the mean share of clipped tokens at the second update
    exact: Array  # [contexts * V], the exact gradient of what the algorithm maximises


def batches(task: Task, group_size: int) -> Iterator[tuple[Group, ...]]:
    """Yield every batch: a group for each prompt, in order."""
    groups = list(itertools.product(task.completions, repeat=group_size))
    return itertools.product(groups, repeat=len(task.prompts))


class Enumeration:
    """One algorithm on one task, all of whose batches are listed."""

    def __init__(self, case: Case, task: Task, group_size: int) -> None:
        self.case, self.task, self.group_size = case, task, group_size
        self.policy, self.reference = task.policy(seed=1, spread=0.7), task.policy(seed=2, spread=0.7)
        twice = replace(case, overrides=case.overrides + (("algo.epochs=2",) if case.has_ratio else ()))
        self.algorithm = composed(twice, task, policy=self.policy, reference=self.reference, group_size=group_size)
        old, reference = self.policy.table.detach().numpy().copy(), self.reference.table.detach().numpy()
        self.logp = log_softmax(old, TEMPERATURE)
        self.listed = self.algorithm.rollouts = Listed(self.algorithm.rollouts)
        self.first = Tables(old) if self.algorithm.head is None else _uneven_critic(self.algorithm.head, old)
        settings = settings_of(case, task)
        self.by_hand = ByHand(case.formula, settings, old, reference, TEMPERATURE, task.length, BASELINE)
        self.greedy = [task.reward(p, task.likeliest(old, p)) for p in range(len(task.prompts))]

    def expectation(self) -> Expectation:
        """Return the results over all batches."""
        updates = 2 if self.case.has_ratio else 1
        real, by_hand = ([np.zeros_like(self.first.flat()) for _ in range(updates)] for _ in range(2))
        off, largest, clipped, count = [0.0] * updates, [0.0] * updates, 0.0, 0
        for groups in batches(self.task, self.group_size):
            count += 1
            samples = [
                [sample_of(self.task, p, ids, greedy_reward=self.greedy[p]) for ids in group]
                for p, group in enumerate(groups)
            ]
            rows = [sample for group in samples for sample in group]
            chance = self.chance(rows)
            expected, share = self._by_hand(samples, updates)
            clipped += chance * share
            for update, gradient in enumerate(self.gradients(groups, updates)):
                real[update] += chance * gradient
                by_hand[update] += chance * expected[update]
                off[update] = float(np.maximum(off[update], np.abs(gradient - expected[update]).max()))  # nan stays
                largest[update] = max(largest[update], float(np.abs(expected[update]).max()))
        distance = [a / b for a, b in zip(off, largest, strict=True)]
        wanted = self.case.exact_gradient(self.algorithm, self.task, self.reference).numpy()
        return Expectation(count, real, by_hand, distance, clipped, wanted)

    def chance(self, rows: list[Sample]) -> float:
        """Return the probability that the policy draws these completions."""
        return math.exp(sum(self.logp[c, a] for s in rows for c, a in zip(s.contexts, s.tokens, strict=True)))

    def chance_of(self, prompt: int, ids: Completion) -> float:
        """Return the probability of one completion."""
        return self.chance([sample_of(self.task, prompt, ids)])

    def gradients(self, groups: tuple[Group, ...], updates: int) -> list[Array]:
        """Return a batch's real gradients: at the policy that sampled it, then after each plain gradient step."""
        batch, trained = self.collect(groups), self._trained()
        before, found = [x.detach().clone() for x in trained], []
        for update in range(updates):
            gradient = torch.autograd.grad(loss_of(self.algorithm, batch, update=update), trained)
            found.append(torch.cat([x.flatten() for x in gradient]).numpy())
            with torch.no_grad():
                for x, slope in zip(trained, gradient, strict=True):
                    x -= self.case.rate * slope
        with torch.no_grad():
            for x, value in zip(trained, before, strict=True):
                x.copy_(value)
        return found

    def collect(self, groups: tuple[Group, ...]) -> Batch:
        """Return the batch that the algorithm makes of these completions."""
        if isinstance(self.algorithm.parts.advantage, RunningBaseline):
            self.algorithm.parts.advantage.load_state_dict({"mean": BASELINE, "num_batches": 3})
        rollout = rollout_of(self.task, groups, self.logp)
        self.listed.queue.append((list(self.algorithm.rollouts.run.data.prompts("train")), rollout))
        return self.algorithm.collect(0)

    def _by_hand(self, samples: list[list[Sample]], updates: int) -> tuple[list[Array], float]:
        found, now, clipped = [], self.first, 0.0
        for _ in range(updates):
            gradient, clipped = self.by_hand.gradient(samples, self.first, now)
            found.append(gradient.flat())
            now = now.moved(gradient, self.case.rate)
        return found, clipped

    def _trained(self) -> list[Tensor]:
        head = self.algorithm.head
        return [self.policy.table, *(() if head is None else head.parameters())]


def _uneven_critic(head: Head, policy: Array) -> Tables:
    """Give a critic a head that is not zero, so that values differ by context; return all that is trained."""
    weight, bias = 0.3 + 0.2 * np.arange(policy.shape[1]), -0.1
    assert isinstance(head, (Critic, ValueHead))
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(weight))
        head.linear.bias.fill_(bias)
    return Tables(policy, policy if isinstance(head, Critic) else None, weight, bias)


def rows_of(case: Case, *, is_small: bool = False) -> list[Row]:
    """Return an algorithm's rows: each batch against its formula, and the expectation against the exact gradient.

    The batches are of one prompt with a group of 3, and of two prompts, one the beginning of the other, with groups of
    2: 4 ** 3 and 3 ** 4 batches, or fewer where `is_small`.
    """
    lone = case.task(((0,),), 2, 2 if is_small else 3)
    one = Enumeration(case, lone, 3).expectation()
    pair = case.task(((0,), (0, 0)), 2, 1 if is_small and case.rewards != "binary" else 2)
    two = Enumeration(case, pair, 2).expectation()
    text = f"gradient of each of {one.num_batches + two.num_batches} batches = its formula's"
    found = [Row(case.name, text, 0.0, max(one.distance[0], two.distance[0]), SAME)]
    if case.has_ratio:
        share = f", {50 * (one.clipped + two.clipped):.0f} % of tokens clipped" if one.clipped else ""
        text = f"the same at a second update, a step away{share}"
        found.append(Row(case.name, text, 0.0, max(one.distance[1], two.distance[1]), SAME))
    size = len(one.exact)
    measured, expected = -one.real[0][:size], -one.by_hand[0][:size]
    if case.scale is None:
        text = "E[gradient] over all batches: degrees from the exact policy gradient"
        found.append(Row(case.name, text, angle(expected, one.exact), angle(measured, one.exact), 1e-6))
    else:
        text = f"E[gradient] over all batches = {case.scale_text}the exact policy gradient"
        found.append(same(case.name, text, measured, case.scale_of(lone, 3) * one.exact))
    return found


def angle(a: Array, b: Array) -> float:
    """Return the angle between two gradients, degrees."""
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
