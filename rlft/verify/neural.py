"""Expected gradients of a network: every group that a tiny GPT-2 can draw for a random table of rewards, in float64.

Here the algorithm uses attention and shared prefixes of prompts, and the gradient is of every weight. The exact answer
comes from plain forward passes of whole sequences.
"""

from __future__ import annotations

import math

import torch

from rlft.models.gpt2 import GPT2
from rlft.verify import exact
from rlft.verify.cases import TEMPERATURE, Case, composed
from rlft.verify.enumerable import Task, random_table
from rlft.verify.groups import batches
from rlft.verify.listed import Listed, loss_of, rollout_of, sample_of
from rlft.verify.verdict import Row, same

GROUP_SIZE = 2


def tiny_gpt(task: Task, *, seed: int, positions: int = 0) -> GPT2:
    """Return a one-layer GPT-2 in float64 whose distributions over tokens are uneven.

    `positions` are added to those that the task needs.
    """
    needed = task.length + max(len(prompt) for prompt in task.prompts)
    model = GPT2.from_config(
        vocab_size=task.vocab_size, n_positions=needed + positions, n_embd=8, n_layer=1, n_head=2, seed=seed
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(15.0)  # fresh weights of 0.02 are close to uniform
    return model


def rows_of(case: Case) -> list[Row]:
    """Return an unbiased algorithm's row: its expected gradient against the exact one, for every weight."""
    task = random_table(2, 3)
    policy, reference = tiny_gpt(task, seed=1), tiny_gpt(task, seed=2)
    algorithm = composed(case, task, policy=policy, reference=reference, group_size=GROUP_SIZE)
    listed = algorithm.rollouts = Listed(algorithm.rollouts)
    logp = exact.table(policy, task, temperature=TEMPERATURE).numpy()
    total = torch.zeros((), dtype=torch.float64)
    for groups in batches(task, GROUP_SIZE):
        listed.queue.append((list(listed.run.data.prompts("train")), rollout_of(task, groups, logp)))
        samples = [sample_of(task, 0, ids) for ids in groups[0]]
        chance = math.exp(sum(logp[c, a] for s in samples for c, a in zip(s.contexts, s.tokens, strict=True)))
        total = total + chance * loss_of(algorithm, algorithm.collect(0), update=0)
    wanted = case.scale_of(task, GROUP_SIZE) * case.exact_gradient(algorithm, task, reference)
    text = f"tiny GPT: E[gradient] of {len(wanted)} weights = {case.scale_text}the exact policy gradient"
    return [same(case.name, text, -exact.gradient(total, policy), wanted)]
