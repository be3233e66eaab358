"""The algorithms that are verified: the YAML of each with its paper's formula, and how it is built on a task."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rlft import build
from rlft.algos.base import Run
from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.config import root_settings
from rlft.models.base import CausalLM
from rlft.verify import exact
from rlft.verify.enumerable import Completion, Task, dense, endings, match
from rlft.verify.formulas import Formula

KL = "algo.kl.coef=0.5"  # large enough to matter beside a reward of about 1
TEMPERATURE = 0.8
_node = functools.cache(build.algorithm_node)


@dataclass(frozen=True)
class Case:
    """An algorithm (its YAML with a few overrides) and the formula that it must equal.

    Arguments:
        name: as the table shows it: the YAML's name, then, after a comma, what is different.
        overrides: of the YAML's settings.
        scale: the ratio of its expected gradient to the exact policy gradient of E[r] - coef KL: `UNBIASED`, or
            `LEAVING_ONE_IN` (Dr. GRPO: (k - 1) / k over the length). None: the algorithm is biased.
        rewards: their kind: one a completion ("completions"), the same but 0 or 1 ("binary"), one a token ("tokens").
        rate: step size of the plain gradient step between the two updates; a negative one makes the loss rise.
    """

    name: str
    formula: Formula
    overrides: tuple[str, ...] = ()
    scale: str | None = None
    rewards: str = "completions"
    rate: float = 1.0

    @property
    def algo(self) -> str:
        return self.name.split(",")[0]

    @property
    def scale_text(self) -> str:
        """`scale` as a row says it, before "the exact policy gradient"."""
        return f"{self.scale} of " if self.scale == LEAVING_ONE_IN else ""

    def scale_of(self, task: Task, group_size: int) -> float:
        """Return `scale` as a number."""
        return (group_size - 1) / group_size / task.length if self.scale == LEAVING_ONE_IN else 1.0

    def task(self, prompts: tuple[Completion, ...], vocab_size: int, length: int) -> Task:
        """Return a task with rewards of the algorithm's kind, whose completions may end before `length`."""
        return {"completions": endings, "binary": match, "tokens": dense}[self.rewards](prompts, vocab_size, length)

    @property
    def has_ratio(self) -> bool:
        return self.formula.surrogate != "score"

    def exact_gradient(self, algorithm: PolicyGradient, task: Task, reference: CausalLM) -> Tensor:
        """Return the exact gradient of what the algorithm maximises, E[r] - coef KL, by every weight, flat."""
        policy, beta = algorithm.run.policy, 0.0 if self.formula.kl == "none" else algorithm.kl.base_coef
        rewards = task.rewards * (self.formula.advantage != "none")  # distillation does not use them
        logp, ref_logp = (exact.logprobs(p, task, temperature=TEMPERATURE) for p in (policy, reference))
        return exact.gradient(exact.objective(logp, ref_logp.detach(), rewards, beta=beta), policy)


UNBIASED, LEAVING_ONE_IN = "1", "(k-1)/k/T"
_RUNNING = "algo/advantage=running_baseline"
_REINFORCE = Formula("return", "score", "sequence_sum", "none")
_GRPO = Formula("zscore", "clipped", "sequence_mean", "k3")
_PPO = Formula("gae", "clipped", "token_mean", "reward", is_whitened=True)
_LAMBDA_1 = ("algo.advantage.lam=1.0", "algo.whiten_advantages=false", "algo/aggregation=sequence_sum")
_PLAIN_RETURNS = ("algo/kl=none", "algo.advantage.gamma=1.0", "algo/aggregation=sequence_sum")

CASES = (
    Case("reinforce", _REINFORCE, scale=UNBIASED),
    Case("reinforce, running baseline", replace(_REINFORCE, advantage="baseline"), (_RUNNING,), UNBIASED),
    Case("reinforce, gamma 0.9", _REINFORCE, ("algo.advantage.gamma=0.9",)),
    Case("reinforce, entropy bonus", _REINFORCE, ("algo.entropy_coef=0.3",)),
    Case("reinforce_pp", Formula("return", "clipped", "token_mean", "reward", is_whitened=True), (KL,)),
    Case("reinforce_pp_baseline", Formula("mean", "clipped", "token_mean", "k2", is_whitened=True), (KL,)),
    Case("rloo", Formula("leave_one_out", "score", "sequence_sum", "reward"), (KL,), UNBIASED),
    Case("remax", Formula("greedy", "score", "sequence_sum", "reward"), (KL,), UNBIASED),
    Case("grpo", _GRPO, (KL,)),
    Case("grpo, dual clip", _GRPO, (KL, "algo.surrogate.dual_clip=1.5"), rate=-4.0),
    Case("dr_grpo", Formula("mean", "clipped", "constant", "none"), scale=LEAVING_ONE_IN, rate=3.0),
    Case("dapo", Formula("zscore", "clipped", "token_mean", "none"), ("algo.resample_zero_std=0",)),
    Case("gspo", Formula("zscore", "sequence", "sequence_mean", "k3"), (KL,)),
    Case("cispo", Formula("zscore", "cispo", "token_mean", "k3"), (KL, "algo.surrogate.clip_high=1.2")),
    Case("sapo", Formula("zscore", "sapo", "sequence_mean", "k3"), (KL,)),
    Case("bnpo", Formula("beta", "clipped", "token_mean", "k3"), (KL,), rewards="binary"),
    Case("ppo", _PPO, (KL, "algo.value_clip=0.002")),
    Case("ppo, shared critic", _PPO, (KL, "algo/critic=shared", "algo.value_coef=0.5")),
    Case("ppo, lambda 1", Formula("gae", "clipped", "sequence_sum", "reward"), (KL, *_LAMBDA_1), UNBIASED),
    Case("raft", Formula("best", "score", "token_mean", "k3"), (KL,)),
    Case("rwr", Formula("softmax", "score", "sequence_mean", "k3"), (KL,)),
    Case("token_rloo", Formula("group_return", "score", "token_mean", "exact"), (KL,), rewards="tokens"),
    Case(
        "token_rloo, returns", replace(_REINFORCE, advantage="group_return"), _PLAIN_RETURNS, UNBIASED, rewards="tokens"
    ),
    Case("distill", Formula("none", "score", "token_mean", "exact"), (KL,)),
)


def composed(
    case: Case,
    task: Task,
    *,
    policy: CausalLM,
    reference: CausalLM | None,
    group_size: int,
    prompts_per_step: int | None = None,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    eval_copies: int = 1,
) -> PolicyGradient:
    """Return the algorithm of a case, built on a task as a run builds it; a step has each prompt once unless told."""
    settings = root_settings(
        seed=seed,
        prompts_per_step=prompts_per_step or len(task.prompts),
        group_size=group_size,
        max_new_tokens=task.length,
        temperature=temperature,
        eval_prompts=eval_copies * len(task.prompts),
        micro_batch=None,
    )
    data, rewards = task.data(eval_copies=eval_copies), task.reward_sum()
    run = Run(settings, policy, task.tokenizer, data, reference, rewards)
    return build.algorithm(settings_of(case, task), run)


def settings_of(case: Case, task: Task) -> dict[str, Any]:
    """Return the composed YAML of a case, from which the formulas take their constants too."""
    return _node(case.algo, case.overrides, max_new_tokens=task.length)
