"""DAPO's dynamic sampling, by listing every draw: groups whose rewards are all equal are replaced by another draw.

Let q be the probability of such a group, and n the most draws for a prompt. A group g of unequal rewards is trained on
with probability p(g) (1 + q + … + q^(n - 1)), and one of equal rewards has no gradient. So the expected gradient is
that of plain sampling times this factor: it is larger, and its direction is the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlft.verify import exact
from rlft.verify.cases import Case, composed
from rlft.verify.enumerable import match
from rlft.verify.groups import Enumeration, batches
from rlft.verify.listed import Listed, loss_of, rollout_of, sample_of
from rlft.verify.verdict import Row, same

DRAWS, GROUP_SIZE = 2, 2


def rows_of(case: Case) -> list[Row]:
    """Return DAPO's row: every pair of first and second draws of groups of two, through the real refilling."""
    task = match(((0,),), 2, 3)
    plain = Enumeration(case, task, GROUP_SIZE)
    refilled = replace(case, overrides=(f"algo.resample_zero_std={DRAWS}",))
    algorithm = composed(refilled, task, policy=plain.policy, reference=plain.reference, group_size=GROUP_SIZE)
    listed = algorithm.rollouts = Listed(algorithm.rollouts)
    prompts = list(listed.run.data.prompts("train"))
    everything, without = list(batches(task, GROUP_SIZE)), 0.0
    gradient = np.zeros_like(plain.first.flat())
    for first in everything:
        has_spread = len({task.reward(0, ids) for ids in first[0]}) > 1
        chance = plain.chance([sample_of(task, 0, ids) for ids in first[0]])
        without += 0.0 if has_spread else chance
        for second in everything[:1] if has_spread else everything:
            listed.queue.clear()
            listed.queue.extend((prompts, rollout_of(task, groups, plain.logp)) for groups in (first, second))
            loss = loss_of(algorithm, algorithm.collect(0), update=0)
            weight = 1.0 if has_spread else plain.chance([sample_of(task, 0, ids) for ids in second[0]])
            gradient += chance * weight * exact.gradient(loss, plain.policy).numpy()
    wanted = plain.expectation().by_hand[0] * sum(without**n for n in range(DRAWS))
    text = f"E[gradient] of refilled groups = (1 + {without:.2f}) of plain sampling's, {without:.2f} have no spread"
    return [same(case.name, text, gradient, wanted)]
