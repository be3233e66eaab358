"""Expected gradients by listing every batch: each group of completions that can be drawn, weighted by its probability.

The real `collect` and `loss` are given one batch after another, and each gradient is compared with the formulas' loops;
then both are summed up, and compared with the exact policy gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlft.algos.online.baselines import RunningBaseline
from rlft.core.batch import Batch
from rlft.models.heads import Critic, Head, ValueHead
from rlft.verify import exact
from rlft.verify.cases import Case, composed, settings_of
from rlft.verify.enumerable import Completion, Task
from rlft.verify.formulas import Array, ByHand, Sample, Tables, log_softmax
from rlft.verify.listed import Group, Listed, loss_of, rollout_of, sample_of
from rlft.verify.verdict import Row

TEMPERATURE, BASELINE = 0.8, 0.375
SAME = 1e-10  # relative, float64


@dataclass
class Expectation:
    """What is found on one task, summed over all its batches."""

    num_batches: int
    real: list[Array]  # the expected gradient at the first and at the second update
    by_hand: list[Array]
    distance: list[float]  # the largest entry by which a batch's gradient is off, over the largest entry of any
    clipped: float  # the mean share of clipped tokens at the second update
    exact: Array  # the exact gradient of what the algorithm climbs, of the policy's table


def batches(task: Task, group_size: int) -> Iterator[tuple[Group, ...]]:
    """Yield every batch: a group for each prompt, in order."""
    groups = list(itertools.product(task.completions, repeat=group_size))
    return itertools.product(groups, repeat=len(task.prompts))


class Enumeration:
    """One algorithm on one task, all of whose batches are listed."""

    def __init__(self, case: Case, task: Task, group_size: int) -> None:
        self.case, self.task, self.group_size = case, task, group_size
        self.policy, self.reference = task.policy(seed=1, spread=0.7), task.policy(seed=2, spread=0.7)
        self.algorithm = composed(
            case.algo, case.overrides + (("algo.epochs=2",) if case.has_ratio else ()), task, policy=self.policy,
            reference=self.reference, temperature=TEMPERATURE, prompts_per_step=len(task.prompts),
            group_size=group_size,
        )  # fmt: skip
        old, reference = self.policy.table.detach().numpy().copy(), self.reference.table.detach().numpy()
        self.logp = log_softmax(old, TEMPERATURE)
        self.listed = self.algorithm.rollouts = Listed(self.algorithm.rollouts)
        self.first = Tables(old) if self.algorithm.head is None else _uneven_critic(self.algorithm.head, old)
        settings = settings_of(case, task)
        self.by_hand = ByHand(case.formula, settings, old, reference, TEMPERATURE, task.length, BASELINE)
        self.greedy = [task.reward(p, task.likeliest(old, p)) for p in range(len(task.prompts))]

    def expectation(self) -> Expectation:
        """Go through all batches."""
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
        return Expectation(count, real, by_hand, distance, clipped, self._exact())

    def chance(self, rows: list[Sample]) -> float:
        """Return the probability that the policy draws these completions."""
        return math.exp(sum(self.logp[c, a] for s in rows for c, a in zip(s.contexts, s.tokens, strict=True)))

    def chance_of(self, prompt: int, ids: Completion) -> float:
        """Return the probability of one completion."""
        return self.chance([sample_of(self.task, prompt, ids)])

    def gradients(self, groups: tuple[Group, ...], updates: int) -> list[Array]:
        """Return the real gradients of a batch: at the policy that sampled it, and after a plain step along it."""
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
        """Return what the algorithm makes of these completions."""
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

    def _exact(self) -> Array:
        beta = 0.0 if self.case.formula.kl == "none" else self.algorithm.kl.base_coef
        logp = exact.logprobs(self.policy, self.task, temperature=TEMPERATURE)
        ref_logp = exact.logprobs(self.reference, self.task, temperature=TEMPERATURE).detach()
        rewards = self.task.rewards * (self.case.formula.advantage != "none")  # distillation does not see them
        objective = exact.objective(logp, ref_logp, rewards, beta=beta)
        return torch.autograd.grad(objective, self.policy.table)[0].flatten().numpy()


def _uneven_critic(head: Head, policy: Array) -> Tables:
    """Give a critic, which starts as the policy or its copy under a head of zeros, values that differ; return them."""
    weight, bias = 0.3 + 0.2 * np.arange(policy.shape[1]), -0.1
    assert isinstance(head, (Critic, ValueHead))
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(weight))
        head.linear.bias.fill_(bias)
    return Tables(policy, policy if isinstance(head, Critic) else None, weight, bias)


def rows_of(case: Case, *, is_small: bool = False) -> list[Row]:
    """Return the rows of one algorithm: every batch by its formula, and the expectation against the exact gradient.

    One prompt with a group of 3, and two prompts, one of which goes on as the other begins, with groups of 2: 4 ** 3
    and 3 ** 4 batches, or fewer where `is_small`.
    """
    lone = case.task(((0,),), 2, 2 if is_small else 3)
    one = Enumeration(case, lone, 3).expectation()
    pair = case.task(((0,), (0, 0)), 2, 1 if is_small and case.rewards != "binary" else 2)
    two = Enumeration(case, pair, 2).expectation()
    text = f"gradient of each of {one.num_batches + two.num_batches} batches = its formula's"
    found = [(text, 0.0, max(one.distance[0], two.distance[0]), SAME)]
    if case.has_ratio:
        share = f", {50 * (one.clipped + two.clipped):.0f} % of tokens clipped" if one.clipped else ""
        text = f"the same at a second update, a step away{share}"
        found.append((text, 0.0, max(one.distance[1], two.distance[1]), SAME))
    size = len(one.exact)
    measured, expected = -one.real[0][:size], -one.by_hand[0][:size]
    if case.scale is None:
        text = "E[gradient] over all batches: degrees from the exact policy gradient"
        found.append((text, angle(expected, one.exact), angle(measured, one.exact), 1e-6))
    else:
        wanted = case.scale_of(lone, 3) * one.exact
        text = f"E[gradient] over all batches = {case.scale_text}the exact policy gradient"
        found.append((text, 0.0, float(np.abs(measured - wanted).max() / np.abs(wanted).max()), SAME))
    return [Row(case.name, *values) for values in found]


def angle(a: Array, b: Array) -> float:
    """Return the angle between two gradients, degrees."""
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
