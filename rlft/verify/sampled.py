"""Statistical checks: the engine's draws, and expected gradients on batches that are too many to list.

Seeds are fixed, so a row is the same at every run. A mean fails if it is more than 5 standard errors from the exact
one, a distribution if its chi-square test has a p-value below 1e-6: correct code fails one of all these rows for one
seed in a thousand.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rlft.core.rng import generator
from rlft.rollout.engine import Rollout, generate
from rlft.rollout.sampling import Sampling
from rlft.verify import exact
from rlft.verify.cases import TEMPERATURE, Case, composed
from rlft.verify.enumerable import Task, endings
from rlft.verify.listed import loss_of
from rlft.verify.verdict import SAME, Row

PROMPTS = ((0,), (1, 2))
ERRORS, SMALLEST_P = 5.0, 1e-6
BATCHES, GROUPS, GROUP_SIZE, DIRECTIONS = 64, 64, 4, 20


def engine() -> list[Row]:
    """Return the rows of the sampler: which completions it draws, how often, and with which logprobs."""
    task, size = endings(PROMPTS, 4, 3), 8000
    policy = task.policy(seed=1, spread=0.8)
    logp = exact.logprobs(policy, task, temperature=TEMPERATURE).detach()
    prompts = [list(prompt) for prompt in task.prompts]
    draw = functools.partial(generate, policy, eos_id=task.tokenizer.eos_id, seed=0)
    drawn = draw(prompts, group_size=size, sampling=Sampling(task.length, TEMPERATURE))
    numbers, off = _listed(task, drawn, logp)
    found = [
        Row("sampler", "draws that are a completion of the task", 1.0, float((numbers >= 0).double().mean()), 0.0),
        Row("sampler", "sampler's logprobs = the policy's, largest difference", 0.0, off, SAME),
    ]
    for p, counts in enumerate(numbers.view(len(prompts), size)):
        observed = torch.bincount(counts.clamp(min=0), minlength=len(task.completions)).double()
        p_value = chi_square(observed, size * logp[p].exp())
        text = f"{size:,} draws after prompt {p + 1}: p-value of their frequencies"
        found.append(Row("sampler", text, SMALLEST_P, p_value, 0.0, ">="))
    pairs = draw(prompts[:1] * 4000, group_size=2, sampling=Sampling(1, TEMPERATURE))
    first, second = pairs.rows.completion_ids.view(-1, 2).t()
    chance = exact.table(policy, task, temperature=TEMPERATURE)[0].exp()
    together = torch.bincount(first * task.vocab_size + second, minlength=task.vocab_size**2).double()
    p_value = chi_square(together, len(first) * (chance[:, None] * chance).flatten())
    found.append(Row("sampler", "4,000 groups of two are independent: p-value", SMALLEST_P, p_value, 0.0, ">="))
    greedy = draw(prompts, group_size=1, sampling=Sampling(task.length, TEMPERATURE, greedy=True))
    wanted = [task.likeliest(policy.table.detach().numpy(), p) for p in range(len(prompts))]
    is_right = float([tuple(ids) for ids in greedy.completions()] == wanted)
    return [*found, Row("sampler", "greedy completions are the likeliest tokens", 1.0, is_right, 0.0)]


def gradients(case: Case) -> list[Row]:
    """Return an unbiased algorithm's rows: the mean gradient of real rollouts against the exact gradient."""
    task = case.task(PROMPTS, 4, 3)
    policy, reference = task.policy(seed=1, spread=0.7), task.policy(seed=2, spread=0.7)
    algorithm = composed(case, task, policy=policy, reference=reference, group_size=GROUP_SIZE, prompts_per_step=GROUPS)
    wanted = case.scale_of(task, GROUP_SIZE) * case.exact_gradient(algorithm, task, reference)
    losses = (loss_of(algorithm, algorithm.collect(index), update=0) for index in range(BATCHES))
    gradients = torch.stack([-exact.gradient(loss, policy) for loss in losses])
    along, error = _mean(gradients @ wanted / (wanted @ wanted))
    text = f"E[gradient] over {BATCHES * GROUPS:,} sampled groups, along the exact one (standard error {error:.3f})"
    found = [Row(case.name, text, 1.0, along, ERRORS * error)]
    directions = generator(0, "verify/directions").standard_normal((len(wanted), DIRECTIONS))
    off = (gradients - wanted) @ torch.from_numpy(directions)  # [batches, directions]
    z = [abs(mean) / error for mean, error in map(_mean, off.t())]
    text = f"the same along {DIRECTIONS} random directions, largest distance in standard errors"
    return [*found, Row(case.name, text, ERRORS, max(z), 0.0, "<=")]


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """Return the p-value of counts given their expectations; cells that expect fewer than 5 are merged into one."""
    is_small = expected < 5.0
    observed = torch.cat([observed[~is_small], observed[is_small].sum()[None]])
    expected = torch.cat([expected[~is_small], expected[is_small].sum()[None]])
    counted = expected > 0
    statistic = ((observed - expected).square() / expected)[counted].sum()
    freedom = torch.tensor((int(counted.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def _listed(task: Task, drawn: Rollout, logp: Tensor) -> tuple[Tensor, float]:
    """Return each draw's index in `task.completions` (-1: not there) and the largest difference in logprobs."""
    places = {ids: number for number, ids in enumerate(task.completions)}
    numbers = [places.get(tuple(ids), -1) for ids in drawn.completions()]
    prompts = drawn.rows.prompt_of_row.tolist()
    triples = zip(drawn.logprobs.sum(1).tolist(), prompts, numbers, strict=True)
    off = [abs(total - float(logp[p, n])) if n >= 0 else math.inf for total, p, n in triples]
    return torch.tensor(numbers), max(off)


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
