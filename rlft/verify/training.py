"""Each algorithm trained to convergence where the limit is known: E[r] - beta KL on a task that can be enumerated.

The real trainer starts at the reference, its learning rate falls to 0, and the final policy is evaluated exactly. An
algorithm with its KL in the reward converges to pi*; one with the KL in the loss, or that weights completions by
something else than their reward, to its own fixed point (`fixed_points`), whose J* - J is then the expected one. No
policy can be above the reward-KL frontier.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.models.base import CausalLM
from rlft.references.frozen import initial
from rlft.tracking.progress import Progress
from rlft.tracking.trackers import NullTracker
from rlft.trainer.trainer import Trainer
from rlft.verify import exact, fixed_points
from rlft.verify.cases import CASES, Case, composed, settings_of
from rlft.verify.enumerable import Task, parity, token_count, two_prompts
from rlft.verify.listed import sample_of
from rlft.verify.policy import TabularPolicy
from rlft.verify.verdict import Row

PROMPTS, GROUP_SIZE, STEPS, RATE = 32, 4, 120, 0.05
TWO_EPOCHS = ("cispo", "sapo")  # which equal GRPO at the first update on a batch
EVAL_COMPLETIONS, ERRORS = 1024, 3.0
ROUNDING = 1e-9
# How far J* - J may be from that of the fixed point, by sampling noise that the last steps do not average out (training
# begins at J* - J = 0.48, or 0.24 on parity). Over 8 seeds it was 0.008 on average and at most 0.020 (reward-weighted
# regression), and almost 0 where advantages vanish at the optimum or the gradient has little variance.
NOISE = {"rloo": 0.002, "distill": 0.005, "token_rloo": 0.01, "reinforce": 0.01, "reinforce_pp": 0.01, "bnpo": 0.015}
OTHER_NOISE = 0.04


@dataclass(frozen=True)
class Trained:
    """The final policy of an algorithm's training, by its exact values."""

    name: str
    task: str
    regret: float  # J* - J
    expected_regret: float  # of the algorithm's own fixed point
    tolerance: float
    kl: float  # to the reference, nats a completion
    reward: float  # E[r]
    excess: float  # E[r] minus the frontier's at this KL
    eval_errors: float  # how far the run's own evaluation is above the frontier, in standard errors

    def rows(self) -> list[Row]:
        """Return the rows of this training."""
        on, errors = f"trained on {self.task}", "standard errors above the frontier"
        return [
            Row(self.name, f"{on}: J* - J, that of its fixed point", self.expected_regret, self.regret, self.tolerance),
            Row(self.name, f"{on}: E[r] above the frontier at its KL", 0.0, self.excess, ROUNDING, "<="),
            Row(self.name, f"{on}: its own evaluation, {errors}", ERRORS, self.eval_errors, 0.0, "<="),
        ]


@dataclass(frozen=True)
class Course:
    """A training: an algorithm, and the task that it is trained on."""

    case: Case
    name: str
    task: Task
    beta: float
    spread: float = 0.0  # standard deviation of the reference's logits; at 0 it is uniform, as the initial policy is


def courses() -> list[Course]:
    """Return all trainings: on token counts, on parity for binary rewards, on two prompts as well for a few.

    Distillation converges to its reference, here a random table: J = - beta KL(pi || teacher), and J* = 0.
    """
    found = []
    for case in CASES:
        if "," in case.name:
            continue
        kl = {"reinforce": "in_reward", "dr_grpo": "k3", "dapo": "k3"}.get(case.algo)  # whose YAML has no KL
        beta = 0.25 if case.rewards == "binary" else 1.0
        overrides = (*((f"algo/kl={kl}",) if kl else ()), f"algo.kl.coef={beta}", "algo.samples_per_step=0")
        overrides += ("algo.epochs=2",) if case.algo in TWO_EPOCHS else ()
        formula = replace(case.formula, kl={"in_reward": "reward"}.get(kl, kl)) if kl else case.formula
        made = replace(case, overrides=overrides, formula=formula)
        if case.rewards == "binary":
            found.append(Course(made, "parity", parity(), beta))
        elif case.formula.advantage == "none":
            teacher = replace(token_count(), reward=lambda _, ids: 0.0, token_rewards=None)
            found.append(Course(made, "a teacher", teacher, beta, spread=1.0))
        else:
            found.append(Course(made, "token count", token_count(), beta))
        if case.algo in ("rloo", "ppo"):
            found.append(Course(made, "two prompts", two_prompts(), beta))
    return found


def trained(course: Course, *, seed: int = 0) -> Trained:
    """Train an algorithm and evaluate its final policy exactly."""
    case, task = course.case, course.task
    policy = task.policy(seed=0, spread=0.0)
    reference = initial(task.policy(seed=1, spread=course.spread))
    sizes = {"prompts_per_step": PROMPTS, "group_size": GROUP_SIZE}
    draws: dict[str, Any] = {"temperature": 1.0, "seed": seed, "eval_copies": EVAL_COMPLETIONS // len(task.prompts)}
    algorithm = composed(case, task, policy=policy, reference=reference, **sizes, **draws)
    steps = STEPS * (2 if algorithm.updates_per_batch > 1 else 1)  # a step on an old batch teaches less
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(algorithm, directory, steps=steps, learning_rate=RATE)
        for step in range(steps):
            trainer.step(step)
        metrics = algorithm.evaluate().metrics
    logp, logq = exact.logprobs(policy, task).detach(), exact.logprobs(reference, task).detach()
    regret, noise = exact.regret(logp, logq, task.rewards, beta=course.beta), NOISE.get(case.algo, OTHER_NOISE)
    kl, reward = float(exact.kl(logp, logq)), float(exact.expected_reward(logp, task.rewards))
    excess = reward - exact.attainable(logq, task.rewards, kl)[0]
    errors = above_frontier(course, policy, reference, metrics["eval/reward"], metrics["eval/kl_completion"])
    return Trained(case.name, course.name, regret, expected_regret(course), noise, kl, reward, excess, errors)


def expected_regret(course: Course) -> float:
    """Return J* - J of the algorithm's own fixed point; 0 where that is pi*.

    That is so with the KL in the reward, for distillation, and for an exact KL of each token in the loss where each
    token has its own reward, as in token counts.
    """
    if course.case.formula.kl in ("reward", "exact"):
        return 0.0
    task = course.task
    policy, reference = task.policy(seed=0, spread=0.0), task.policy(seed=0, spread=0.0)
    settings = settings_of(course.case, task)
    fixed_points.climb(course.case.formula, settings, task, policy, reference, group_size=GROUP_SIZE)
    logp, logq = exact.logprobs(policy, task).detach(), exact.logprobs(reference, task).detach()
    return exact.regret(logp, logq, task.rewards, beta=course.beta)


def above_frontier(course: Course, policy: TabularPolicy, reference: CausalLM, reward: float, kl: float) -> float:
    """Return how far a sampled evaluation is above the frontier, in standard errors.

    To first order the distance is the mean over completions of r - slope KL, minus a constant, and the variance of that
    under the policy is known exactly.
    """
    task = course.task
    logp, logq = exact.logprobs(policy, task).detach(), exact.logprobs(reference, task).detach()
    most, slope = exact.attainable(logq, task.rewards, kl)
    values = task.rewards - slope * completion_kl(policy, reference, task)
    mean = (logp.exp() * values).sum(1, keepdim=True)
    variance = (logp.exp() * (values - mean).square()).sum(1).mean()
    return (reward - most) / math.sqrt(float(variance) / EVAL_COMPLETIONS)


def completion_kl(policy: TabularPolicy, reference: CausalLM, task: Task) -> Tensor:
    """Return the sum over a completion's contexts of the next token's KL(policy || reference), [P, N]."""
    logp, logq = exact.table(policy, task), exact.table(reference, task)
    of_context = (logp.exp() * (logp - logq)).sum(1)
    whole = [[sample_of(task, p, ids).contexts for ids in task.completions] for p in range(len(task.prompts))]
    rows = [[sum(float(of_context[c]) for c in contexts) for contexts in prompt] for prompt in whole]
    return torch.tensor(rows, dtype=torch.float64)


def trainer_of(
    algorithm: PolicyGradient, run_dir: str, *, steps: int, learning_rate: float, micro_batch: int | None = None
) -> Trainer:
    """Return the real trainer, which prints nothing, with a learning rate that falls linearly to 0."""
    settings = replace(algorithm.run.settings, steps=steps, micro_batch=micro_batch, learning_rate=learning_rate)
    settings = replace(settings, seed=0, schedule="linear", max_grad_norm=100.0, save_every=0, keep=1)
    return Trainer(
        replace(algorithm.run, settings=settings),
        algorithm,
        accelerator=Accelerator(cpu=True),
        run_dir=Path(run_dir),
        tracker=NullTracker(),
        progress=Progress(total_steps=steps, log_every=1, console=Console(quiet=True)),
    )
