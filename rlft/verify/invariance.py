"""The gradient must not depend on how a batch is cut into micro-batches, padded or ordered.

A tiny GPT-2 samples completions of unequal length after prompts of unequal length. They go through `collect` and `loss`
as they are, with more padding (of garbage) behind prompts and completions, and with prompts and group members in
another order; the loss is taken of the whole batch, and summed over micro-batches of several sizes. The policy is moved
between `collect` and `loss`, as by an optimizer step, so that ratios differ from 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlft.algos.online.baselines import RunningBaseline
from rlft.core.batch import Denominators, Rows
from rlft.core.metrics import Metrics
from rlft.data.prompts import Prompt
from rlft.models.scorer import Scorer
from rlft.rollout.engine import Rollout, generate
from rlft.rollout.sampling import Sampling
from rlft.verify.cases import CASES, TEMPERATURE, Case, composed
from rlft.verify.listed import Listed
from rlft.verify.neural import tiny_gpt
from rlft.verify.training import trainer_of
from rlft.verify.verdict import SAME, Row

PROMPTS = ((0,), (1, 0), (2, 1, 0))
GROUP_SIZE, GARBAGE = 4, 3  # GARBAGE: columns of padding
CUTS: tuple[dict[str, Any], ...] = ({"max_rows": 1}, {"max_rows": 5}, {"max_tokens": 17})


@dataclass(frozen=True)
class Measured:
    loss: Tensor
    gradient: Tensor  # of the policy and, where there is one, the critic
    metrics: dict[str, float]


def rows_of(case: Case) -> list[Row]:
    """Return an algorithm's rows: the largest relative difference in loss, gradient and metrics."""
    made = Bench(case)
    drawn = made.drawn()
    whole = made.measured(*drawn)
    found = [
        ("micro-batches of 1 row, 5 rows, 17 tokens change nothing", [made.measured(*drawn, **cut) for cut in CUTS]),
        ("more padding, with garbage in it, changes nothing", [made.measured(*padded(*drawn))]),
        ("another order of prompts and of group members changes nothing", [made.measured(*reordered(*drawn))]),
    ]
    return [Row(case.name, text, 0.0, difference(whole, others), SAME) for text, others in found]


def trainer_rows() -> list[Row]:
    """Return the rows of the real trainer: a step's loss and gradient norm with micro-batches of several sizes."""
    found = []
    for case in (case for case in CASES if case.name in ("grpo", "ppo")):
        steps = []
        for rows in (None, 5, 1):
            bench = Bench(case)
            with tempfile.TemporaryDirectory() as directory:
                trainer = trainer_of(bench.algorithm, directory, steps=4, learning_rate=0.01, micro_batch=rows)
                bench.listed.queue.append(bench.drawn())
                steps.append(trainer.step(0))
        text = f"{case.name}: loss and gradient norm of a step with micro-batches of 5 rows and of 1"
        names = ("loss", "grad_norm")
        off = max(abs(step[name] / steps[0][name] - 1.0) for step in steps[1:] for name in names)
        found.append(Row("trainer", text, 0.0, off, SAME))
    return found


class Bench:
    """An algorithm that is given rollouts, and whose policy is moved between sampling and loss."""

    def __init__(self, case: Case) -> None:
        self.task = case.task(PROMPTS, 4, 4)
        self.policy = tiny_gpt(self.task, seed=1, positions=GARBAGE)
        reference = tiny_gpt(self.task, seed=2, positions=GARBAGE)
        self.algorithm = composed(case, self.task, policy=self.policy, reference=reference, group_size=GROUP_SIZE)
        self.listed = self.algorithm.rollouts = Listed(self.algorithm.rollouts)
        self.scorer = Scorer(self.policy, self.algorithm.head)

    def drawn(self) -> tuple[list[Prompt], Rollout]:
        """Return prompts and the completions that the policy samples."""
        prompts = list(self.listed.run.data.prompts("train"))
        sampling, eos_id = Sampling(self.task.length, TEMPERATURE), self.task.tokenizer.eos_id
        ids = [prompt.ids for prompt in prompts]
        return prompts, generate(self.policy, ids, group_size=GROUP_SIZE, sampling=sampling, eos_id=eos_id, seed=0)

    def measured(self, prompts: list[Prompt], rollout: Rollout, **cut: int) -> Measured:
        """Collect these completions, move the policy, and sum the loss over micro-batches."""
        if isinstance(self.algorithm.parts.advantage, RunningBaseline):
            self.algorithm.parts.advantage.load_state_dict({"mean": 0.25, "num_batches": 3})
        self.listed.queue.append((prompts, rollout))
        batch, metrics = self.algorithm.collect(0), Metrics()
        denominators = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
        trained = list(self.scorer.parameters())
        before = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for p in trained:
                p.add_(0.1 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view(p.shape))
        loss, gradient = torch.zeros((), dtype=torch.float64), [torch.zeros_like(p) for p in trained]
        for micro in batch.micro_batches(**cut) if cut else [batch]:
            share = self.algorithm.loss(self.scorer, micro, denominators, metrics, update=1)
            loss = loss + share.detach()
            for total, part in zip(gradient, torch.autograd.grad(share, trained), strict=True):
                total += part
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
        return Measured(loss, torch.cat([g.flatten() for g in gradient]), batch.metrics.local() | metrics.local())


def padded(prompts: list[Prompt], rollout: Rollout) -> tuple[list[Prompt], Rollout]:
    """Return the same rollout with more padding, and with arbitrary ids and logprobs in all padding."""
    rows = rollout.rows
    mask = pad(rows.completion_mask, (0, GARBAGE))
    ids = torch.where(mask, pad(rows.completion_ids, (0, GARBAGE)), 2)
    slots = pad(rows.prompt_ids, (0, GARBAGE))
    slots = torch.where(torch.arange(slots.shape[1]) < rows.prompt_lengths[:, None], slots, 1)
    logprobs = torch.where(mask, pad(rollout.logprobs, (0, GARBAGE)), 7.0)
    made = replace(rows, prompt_ids=slots, completion_ids=ids, completion_mask=mask)
    return prompts, replace(rollout, rows=made, logprobs=logprobs)


def reordered(prompts: list[Prompt], rollout: Rollout) -> tuple[list[Prompt], Rollout]:
    """Return the same rollout with its prompts, and the members of each group, in reverse order."""
    rows = rollout.rows
    ids, mask = rows.completion_ids.flip(0), rows.completion_mask.flip(0)
    made = Rows(rows.prompt_ids.flip(0), rows.prompt_lengths.flip(0), rows.prompt_of_row, ids, mask)
    return prompts[::-1], Rollout(made, rollout.logprobs.flip(0), rollout.finish_reasons[::-1])


def difference(whole: Measured, others: Iterable[Measured]) -> float:
    """Return the largest difference of loss, gradient and any metric, each relative to that of the whole batch."""
    found = [0.0]
    for other in others:
        found.append(float((other.loss - whole.loss).abs() / whole.loss.abs()))
        found.append(float((other.gradient - whole.gradient).abs().max() / whole.gradient.abs().max()))
        for name in whole.metrics.keys() | other.metrics.keys():
            a, b = whole.metrics[name], other.metrics[name]
            found.append(abs(a - b) / max(1.0, abs(a)))
    return max(found, key=lambda x: float("inf") if x != x else x)
