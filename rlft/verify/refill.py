"""DAPO's dynamic sampling, by listing every draw: groups without a spread are replaced, and what that does on average.

With q the chance that a group has no spread and at most n draws of one prompt, a group g with a spread is what is
trained on with probability p(g) (1 + q + … + q^(n - 1)); one without has no gradient. So the expected gradient is that
of plain sampling, longer by this factor: the data are used better, and the direction stays.
"""

from __future__ import annotations

import numpy as np
import torch

from rlft.verify.cases import Case, composed
from rlft.verify.enumerable import match
from rlft.verify.groups import SAME, TEMPERATURE, Enumeration, batches
from rlft.verify.listed import Listed, loss_of, rollout_of, sample_of
from rlft.verify.verdict import Row

DRAWS, GROUP_SIZE = 2, 2


def rows_of(case: Case) -> list[Row]:
    """Return DAPO's row: two draws at most, each pair of groups of two given to the real refilling."""
    task = match(((0,),), 2, 3)
    plain = Enumeration(case, task, GROUP_SIZE)
    algorithm = composed(
        case.algo, (f"algo.resample_zero_std={DRAWS}",), task, policy=plain.policy, reference=plain.reference,
        temperature=TEMPERATURE, prompts_per_step=1, group_size=GROUP_SIZE,
    )  # fmt: skip
    listed = algorithm.rollouts = Listed(algorithm.rollouts)
    prompts = list(listed.run.data.prompts("train"))
    everything, without = list(batches(task, GROUP_SIZE)), 0.0
    gradient = np.zeros_like(plain.first.policy)
    for first in everything:
        has_spread = len({task.reward(0, ids) for ids in first[0]}) > 1
        chance = plain.chance([sample_of(task, 0, ids) for ids in first[0]])
        without += 0.0 if has_spread else chance
        for second in everything[:1] if has_spread else everything:
            listed.queue.clear()
            listed.queue.extend((prompts, rollout_of(task, groups, plain.logp)) for groups in (first, second))
            loss = loss_of(algorithm, algorithm.collect(0), update=0)
            weight = 1.0 if has_spread else plain.chance([sample_of(task, 0, ids) for ids in second[0]])
            gradient += chance * weight * torch.autograd.grad(loss, plain.policy.table)[0].numpy()
    wanted = plain.expectation().by_hand[0].reshape(gradient.shape) * sum(without**n for n in range(DRAWS))
    distance = float(np.abs(gradient - wanted).max() / np.abs(wanted).max())
    text = f"E[gradient] of refilled groups = (1 + {without:.2f}) of plain sampling's, {without:.2f} have no spread"
    return [Row(case.name, text, 0.0, distance, SAME)]
