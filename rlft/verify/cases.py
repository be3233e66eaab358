"""What is verified: every online algorithm's YAML with its paper's formula, and how it is built on a task."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from rlft import build
from rlft.algos.base import Run
from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.config import root_settings
from rlft.models.base import CausalLM
from rlft.verify.enumerable import Completion, Task, dense, endings, match
from rlft.verify.formulas import Formula

KL = "algo.kl.coef=0.5"  # large enough to be seen beside a reward of about 1
_node = functools.cache(build.algorithm_node)


@dataclass(frozen=True)
class Case:
    """An algorithm, as its YAML and a few overrides make it, and the formula that it must equal.

    Arguments:
        name: as the table shows it; it begins with the YAML's name.
        overrides: on top of the YAML.
        scale: what its expected gradient is over the exact policy gradient of E[r] - coef KL; None: nothing, it is
            biased. `LEAVING_ONE_IN` is Dr. GRPO's (k - 1) / k over the length.
        rewards: what the algorithm is for: of completions, "binary" (0 and 1), or of "tokens".
        rate: of the plain gradient step between the two updates; where it is negative, the loss rises.
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
        """What stands before "the exact policy gradient"."""
        return f"{self.scale} of " if self.scale == LEAVING_ONE_IN else ""

    def scale_of(self, task: Task, group_size: int) -> float:
        """Return `scale` as a number."""
        return (group_size - 1) / group_size / task.length if self.scale == LEAVING_ONE_IN else 1.0

    def task(self, prompts: tuple[Completion, ...], vocab_size: int, length: int) -> Task:
        """Return a task with the rewards that the algorithm is for; completions end where the policy says."""
        return {"completions": endings, "binary": match, "tokens": dense}[self.rewards](prompts, vocab_size, length)

    @property
    def has_ratio(self) -> bool:
        return self.formula.surrogate != "score"


UNBIASED, LEAVING_ONE_IN = "1", "(k-1)/k/T"
_RUNNING = "algo/advantage=running_baseline"

CASES = (
    Case("reinforce", Formula("return", "score", "sequence_sum", "none"), scale=UNBIASED),
    Case(
        "reinforce, running baseline", Formula("baseline", "score", "sequence_sum", "none"), (_RUNNING,), UNBIASED
    ),
    Case(
        "reinforce, gamma 0.9", Formula("return", "score", "sequence_sum", "none"), ("algo.advantage.gamma=0.9",)
    ),
    Case("reinforce, entropy bonus", Formula("return", "score", "sequence_sum", "none"), ("algo.entropy_coef=0.3",)),
    Case("reinforce_pp", Formula("return", "clipped", "token_mean", "reward", is_whitened=True), (KL,)),
    Case("reinforce_pp_baseline", Formula("mean", "clipped", "token_mean", "k2", is_whitened=True), (KL,)),
    Case("rloo", Formula("leave_one_out", "score", "sequence_sum", "reward"), (KL,), UNBIASED),
    Case("remax", Formula("greedy", "score", "sequence_sum", "reward"), (KL,), UNBIASED),
    Case("grpo", Formula("zscore", "clipped", "sequence_mean", "k3"), (KL,)),
    Case(
        "grpo, dual clip", Formula("zscore", "clipped", "sequence_mean", "k3"), (KL, "algo.surrogate.dual_clip=1.5"),
        rate=-4.0,
    ),
    Case("dr_grpo", Formula("mean", "clipped", "constant", "none"), scale=LEAVING_ONE_IN, rate=3.0),
    Case("dapo", Formula("zscore", "clipped", "token_mean", "none"), ("algo.resample_zero_std=0",)),
    Case("gspo", Formula("zscore", "sequence", "sequence_mean", "k3"), (KL,)),
    Case("cispo", Formula("zscore", "cispo", "token_mean", "k3"), (KL, "algo.surrogate.clip_high=1.2")),
    Case("sapo", Formula("zscore", "sapo", "sequence_mean", "k3"), (KL,)),
    Case("bnpo", Formula("beta", "clipped", "token_mean", "k3"), (KL,), rewards="binary"),
    Case("ppo", Formula("gae", "clipped", "token_mean", "reward", is_whitened=True), (KL, "algo.value_clip=0.002")),
    Case(
        "ppo, shared critic", Formula("gae", "clipped", "token_mean", "reward", is_whitened=True),
        (KL, "algo/critic=shared", "algo.value_coef=0.5"),
    ),
    Case(
        "ppo, lambda 1", Formula("gae", "clipped", "sequence_sum", "reward"),
        (KL, "algo.advantage.lam=1.0", "algo.whiten_advantages=false", "algo/aggregation=sequence_sum"), UNBIASED,
    ),
    Case("raft", Formula("best", "score", "token_mean", "k3"), (KL,)),
    Case("rwr", Formula("softmax", "score", "sequence_mean", "k3"), (KL,)),
    Case("token_rloo", Formula("group_return", "score", "token_mean", "exact"), (KL,), rewards="tokens"),
    Case(
        "token_rloo, returns", Formula("group_return", "score", "sequence_sum", "none"),
        ("algo/kl=none", "algo.advantage.gamma=1.0", "algo/aggregation=sequence_sum"), UNBIASED, rewards="tokens",
    ),
    Case("distill", Formula("none", "score", "token_mean", "exact"), (KL,)),
)  # fmt: skip


def composed(
    algo: str,
    overrides: tuple[str, ...],
    task: Task,
    *,
    policy: CausalLM,
    reference: CausalLM | None,
    prompts_per_step: int,
    group_size: int,
    temperature: float = 1.0,
    seed: int = 0,
    eval_copies: int = 1,
    parts: dict[str, Any] | None = None,
) -> PolicyGradient:
    """Return the algorithm that conf/algo/<algo>.yaml makes on a task; `parts` replace built ones."""
    node = _node(algo, overrides, max_new_tokens=task.length)
    settings = root_settings(
        seed=seed,
        prompts_per_step=prompts_per_step,
        group_size=group_size,
        max_new_tokens=task.length,
        temperature=temperature,
        eval_prompts=eval_copies * len(task.prompts),
        micro_batch=None,
    )
    data, rewards = task.data(eval_copies=eval_copies), task.reward_sum()
    return build.algorithm(node, Run(settings, policy, task.tokenizer, data, reference, rewards), **(parts or {}))


def settings_of(case: Case, task: Task) -> dict[str, Any]:
    """Return the composed YAML of a case: the formulas take their constants from it."""
    return _node(case.algo, case.overrides, max_new_tokens=task.length)
