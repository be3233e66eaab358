"""Checks of the exact answers themselves: pi* and J* in closed form, and the policy gradient computed in two ways."""

from __future__ import annotations

import math

import numpy as np

from rlft.models.base import CausalLM
from rlft.verify import exact
from rlft.verify.cases import TEMPERATURE
from rlft.verify.enumerable import Task, endings, match, parity, random_table, token_count, two_prompts
from rlft.verify.formulas import log_softmax
from rlft.verify.listed import sample_of
from rlft.verify.neural import tiny_gpt
from rlft.verify.policy import TabularPolicy
from rlft.verify.verdict import SAME, Row, same

# V = 3, T = 4, a uniform reference, r = the count of token 0: beta, E[r], KL, J* (computed outside this package)
PUBLISHED = (
    (0.5, 3.147944, 1.732158, 2.281865),
    (1.0, 2.304468, 0.493138, 1.811330),
    (2.0, 1.807451, 0.120668, 1.566116),
)
BETA = 0.5


def rows() -> list[Row]:
    """Return all rows about optima and exact gradients."""
    found = []
    task = token_count()
    ref_logp = exact.logprobs(task.policy(seed=0, spread=0.0), task).detach()
    for beta, *published in PUBLISHED:
        best = exact.optimum(ref_logp, task.rewards, beta=beta)
        names = ("E[r]", "KL(pi* || ref)", "J*")
        for name, value, measured in zip(names, published, (best.reward, best.kl, best.objective), strict=True):
            found.append(Row("optimum", f"token count, V=3 T=4, beta {beta:g}: {name}", value, measured, 5e-7))
    large = token_count(10, 5)
    best = exact.optimum(exact.logprobs(large.policy(seed=0, spread=0.0), large).detach(), large.rewards, beta=BETA)
    closed = 5 * BETA * math.log((9 + math.exp(1 / BETA)) / 10)
    found.append(Row("optimum", "token count, V=10 T=5, 100,000 completions: J*", closed, best.objective, SAME))
    return [*found, *_identities(), *_gradients()]


def _identities() -> list[Row]:
    """J(pi) = J* - beta KL(pi || pi*), for a random policy."""
    pairs: list[tuple[str, Task, CausalLM, CausalLM]] = []
    for name, task in (
        ("token count", token_count()),
        ("parity", parity()),
        ("exact match, variable length", match(((0,),), 3, 3)),
        ("two prompts", two_prompts()),
    ):
        pairs.append((name, task, task.policy(seed=1, spread=0.7), task.policy(seed=2, spread=0.7)))
    task = random_table(3, 4)
    pairs.append(("random table, tiny GPT", task, tiny_gpt(task, seed=1), tiny_gpt(task, seed=2)))
    found = []
    for name, task, policy, reference in pairs:
        logp, logq = exact.logprobs(policy, task).detach(), exact.logprobs(reference, task).detach()
        best = exact.optimum(logq, task.rewards, beta=BETA)
        value = float(exact.objective(logp, logq, task.rewards, beta=BETA))
        text = f"{name}: J(pi) = J* - beta KL(pi || pi*)"
        found.append(Row("optimum", text, best.objective - BETA * float(exact.kl(logp, best.logp)), value, SAME))
    return found


def _gradients() -> list[Row]:
    """The exact gradient by autograd over all completions, against a loop that sums the score function."""
    task = endings(((0,), (1, 0)), 3, 3)
    policy, reference = task.policy(seed=1, spread=0.7), task.policy(seed=2, spread=0.7)
    logp, logq = (exact.logprobs(p, task, temperature=TEMPERATURE) for p in (policy, reference))
    value = exact.objective(logp, logq.detach(), task.rewards, beta=BETA)
    wanted = _score_function(task, policy, reference)
    text = "E[r] - beta KL: gradient by autograd = score function, in a loop"
    return [same("optimum", text, exact.gradient(value, policy).numpy(), wanted.ravel())]


def _score_function(task: Task, policy: TabularPolicy, reference: TabularPolicy) -> np.ndarray:
    """Return sum over y of p(y) (r(y) - beta log p(y) / q(y)) grad log p(y), the mean over prompts."""
    logp = log_softmax(policy.table.detach().numpy(), TEMPERATURE)
    logq = log_softmax(reference.table.detach().numpy(), TEMPERATURE)
    gradient = np.zeros_like(logp)
    for prompt in range(len(task.prompts)):
        for ids in task.completions:
            sample = sample_of(task, prompt, ids)
            pairs = list(zip(sample.contexts, sample.tokens, strict=True))
            own, ref = sum(logp[c, a] for c, a in pairs), sum(logq[c, a] for c, a in pairs)
            worth = math.exp(own) * (sum(sample.rewards) - BETA * (own - ref)) / len(task.prompts)
            for c, a in pairs:
                gradient[c] += worth * (np.eye(task.vocab_size)[a] - np.exp(logp[c])) / TEMPERATURE
    return gradient
