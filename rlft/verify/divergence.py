"""The KL penalty: the mean of each estimator and of its gradient, what a run trains by it, and what it logs.

For completions drawn from the policy (J. Schulman, "Approximating KL divergence", 2020): E[k1] = E[k3] = KL(pi || ref),
and E[k2] is not; E[grad k1] = 0, E[grad k2] = grad KL(pi || ref), E[grad k3] = grad KL(ref || pi). In the loss an
estimator is taken of each token: the same then holds for the next-token distributions at the contexts that the policy
visits, and how often it visits them gets no gradient. In the reward the gradient is that of the whole KL(pi || ref).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlft.core.metrics import Metrics
from rlft.functional import kl as estimators
from rlft.verify import exact
from rlft.verify.cases import KL, TEMPERATURE, Case
from rlft.verify.enumerable import Task, endings, random_table
from rlft.verify.formulas import Formula
from rlft.verify.groups import Enumeration
from rlft.verify.listed import loss_of
from rlft.verify.policy import TabularPolicy
from rlft.verify.verdict import SAME, Row, same

COEF = 0.5  # as `KL` sets it
IN_LOSS, IN_REWARD = ("k2", "k3", "exact"), "in_reward"


def rows() -> list[Row]:
    """Return all rows about the KL."""
    return [*_of_completions(), *_trained(), *_logged()]


def _of_completions() -> list[Row]:
    task = endings(((0,),), 3, 3)
    policy, reference = task.policy(seed=1, spread=0.7), task.policy(seed=2, spread=0.7)
    logp, logq = exact.logprobs(policy, task), exact.logprobs(reference, task).detach()
    chance = logp.exp().detach()
    forwards, backwards = exact.kl(logp, logq), (logq.exp() * (logq - logp)).sum()
    value = float(forwards.detach())
    by_hand = 0.5 * float((chance * (logp - logq).detach().square()).sum())
    assert abs(by_hand - value) > 0.05  # or a k2 that is the KL on average would pass
    found = []
    for name, wanted in (("k1", value), ("k2", by_hand), ("k3", value)):
        mean = (chance * getattr(estimators, name)(logp, logq)).sum()
        text = f"E[{name}]" + (" = E[d^2] / 2, not the KL" if name == "k2" else " = KL(pi || ref), nats a completion")
        found.append(Row("kl", text, wanted, float(mean.detach()), SAME))
    for name, of, text in (
        ("k1", 0.0 * forwards, "0"),
        ("k2", forwards, "grad KL(pi || ref)"),
        ("k3", backwards, "grad KL(ref || pi)"),
    ):
        off = (chance * getattr(estimators, name)(logp, logq)).sum() - of
        found.append(Row("kl", f"E[grad {name}] = {text}", 0.0, float(exact.gradient(off, policy).abs().max()), SAME))
    return found


def _trained() -> list[Row]:
    """What a run's loss trains when all rewards are 0: its expected gradient, through the real `collect` and `loss`."""
    task = replace(endings(((0,),), 2, 3), reward=lambda _, ids: 0.0)
    found = []
    for choice in (*IN_LOSS, IN_REWARD):
        made = Enumeration(_case(choice), task, 1)
        expectation = made.expectation()
        wanted = COEF * _what_is_trained(choice, made.policy, made.reference, task)
        text = {
            "k2": "k2 in the loss: E[gradient] = that of KL(pi || ref) of the tokens",
            "k3": "k3 in the loss: E[gradient] = that of KL(ref || pi) of the tokens",
            "exact": "exact in the loss: E[gradient] = that of KL(pi || ref) of the tokens",
            IN_REWARD: "k1 in the reward: E[gradient] = that of KL(pi || ref) of the completion",
        }[choice]
        found.append(same("kl", text, expectation.real[0], wanted))
        text = f"{text.split(':')[0]}: each gradient = its formula's"
        found.append(Row("kl", text, 0.0, max(expectation.distance), SAME))
    return found


def _logged() -> list[Row]:
    """The means of the metrics `kl` and `kl_exact`, nats a token, where all completions have one length."""
    task = random_table(3, 2)
    found = []
    for choice in ("k3", "exact", IN_REWARD):
        made = Enumeration(_case(choice), task, 1)
        pair = (exact.logprobs(p, task, temperature=TEMPERATURE).detach() for p in (made.policy, made.reference))
        wanted = float(exact.kl(*pair))
        logged = {"kl": 0.0, "kl_exact": 0.0}
        for ids in task.completions:
            metrics = Metrics()
            loss_of(made.algorithm, made.collect(((ids,),)), update=0, metrics=metrics)
            row = metrics.local()
            for name in logged:
                logged[name] += made.chance_of(0, ids) * row[name]
        where = "k1 in the reward" if choice == IN_REWARD else f"{choice} in the loss"
        for name, value in logged.items():
            text = f"{where}: E[logged {name}] = KL(pi || ref) / T"
            found.append(Row("kl", text, wanted / task.length, value, SAME))
    return found


def _case(choice: str) -> Case:
    kl = "reward" if choice == IN_REWARD else choice
    return Case("reinforce", Formula("return", "score", "sequence_sum", kl), (f"algo/kl={choice}", KL))


def _what_is_trained(choice: str, policy: TabularPolicy, reference: TabularPolicy, task: Task) -> np.ndarray:
    """Return the expected gradient of a penalty of strength 1, [contexts * V], by autograd of exact expectations."""
    if choice == IN_REWARD:
        whole = (exact.logprobs(p, task, temperature=TEMPERATURE) for p in (policy, reference))
        return exact.gradient(exact.kl(*whole), policy).numpy()
    chance = exact.logprobs(policy, task, temperature=TEMPERATURE)[0].exp().detach()
    forwards, backwards = exact.token_kls(policy, reference, temperature=TEMPERATURE)
    held = (exact.visits(task, chance) * (backwards if choice == "k3" else forwards)).sum()
    return exact.gradient(held, policy).numpy()
