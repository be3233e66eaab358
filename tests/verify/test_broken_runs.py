"""KL, sampler, scoring and the measuring itself are broken on purpose: `verify` fails at the row that is about each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rlft.algos.online.evaluation
import rlft.algos.online.kl
import rlft.algos.online.rollouts
import rlft.algos.online.scoring
import rlft.models.scorer
import rlft.rollout.engine
import rlft.rollout.sampling
from rlft.functional import advantages
from rlft.functional import kl as divergences
from rlft.verify import divergence, exact, optimum, refill, sampled, training
from rlft.verify.runner import guarded
from tests.verify.breaking import EXPECTED, FIRST, SECOND, break_, case_of, check, drawn, gradients, unchanged

# KL.


def swapped(right, logprobs, ref_logprobs):
    return right(ref_logprobs - 2 * (ref_logprobs - logprobs).detach() + (ref_logprobs - logprobs), ref_logprobs)


def other_direction(right, logprobs, ref_logprobs):
    d = ref_logprobs - logprobs
    return torch.expm1(-d) + d  # exp(d) - 1 - d of the opposite ratio


def not_squared(right, logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).abs()


def of_the_other_sign(right, logprobs, ref_logprobs):
    return -right(logprobs, ref_logprobs)


def with_the_reference_first(right, logits, ref_logits):
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    return (logq.exp() * (logq - logp)).sum(-1)


@pytest.mark.parametrize(
    ("part", "broken", "fails", "passes"),
    [
        (
            "k1",
            of_the_other_sign,
            ("E[k1]", "k1 in the reward: E[gradient]", "k1 in the reward: E[logged kl]"),
            ("E[k3]",),
        ),
        ("k2", not_squared, ("E[k2]", "E[grad k2]", "k2 in the loss: each"), ("E[k3]", "E[grad k3]")),
        ("k3", other_direction, ("E[k3]", "E[grad k3]", "k3 in the loss: E[gradient]"), ("E[k1]", "E[grad k2]")),
    ],
)
def test_a_wrong_estimator_is_seen(monkeypatch, part, broken, fails, passes):
    break_(monkeypatch, divergences, part, broken)
    monkeypatch.setitem(rlft.algos.online.kl.ESTIMATORS, part, getattr(divergences, part))
    check(guarded("kl", divergence.rows), fails=fails, passes=passes)
    if part == "k3":
        check(gradients("grpo"), fails=(FIRST, SECOND))


def test_an_exact_kl_in_the_wrong_direction_is_seen(monkeypatch):
    break_(monkeypatch, rlft.algos.online.scoring, "exact", with_the_reference_first)
    wrong = ("exact in the loss: E[gradient]", "exact in the loss: each")
    check(guarded("kl", divergence.rows), fails=wrong, passes=("k3 in the loss: each",))


def test_a_penalty_of_the_wrong_sign_in_the_reward_is_seen(monkeypatch):
    right = rlft.algos.online.scoring.ReferenceScores.sampled_kl
    monkeypatch.setattr(rlft.algos.online.scoring.ReferenceScores, "sampled_kl", lambda *a: -right(*a))
    check(gradients("rloo"), fails=(FIRST, EXPECTED))
    check(guarded("kl", divergence.rows), fails=("k1 in the reward: E[gradient]",), passes=("k3 in the loss: each",))


def test_a_kl_in_the_loss_without_a_gradient_is_seen(monkeypatch):
    right = rlft.algos.online.scoring.ReferenceScores.token_kl
    monkeypatch.setattr(rlft.algos.online.scoring.ReferenceScores, "token_kl", lambda *a: right(*a).detach())
    check(gradients("grpo"), fails=(FIRST, SECOND))


# Rollout and scoring.


def cold(right, logits, uniform):
    return right(logits * 1.3, uniform)


def one_further(right, logits, uniform):
    ids, _ = right(logits, uniform)
    ids = (ids + (uniform < 0.03)).clamp(max=logits.shape[1] - 1)
    return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def of_the_undivided_logits(right, logits, uniform):
    ids, _ = right(logits, uniform)
    return ids, (0.8 * logits).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def same_for_all_members(right, members, **a):
    return right(members=[0] * len(members), **a)


def without_the_end_token(right, **a):
    right(**a)
    state = a["state"]
    state.counts = (state.counts - state.stopped.long()).clamp(min=1)


@pytest.mark.parametrize(
    ("part", "broken", "fails"),
    [
        ("sample", cold, ("p-value of their frequencies",)),
        ("sample", one_further, ("p-value of their frequencies",)),
        ("sample", of_the_undivided_logits, ("sampler's logprobs",)),
        ("uniforms", same_for_all_members, ("p-value of their frequencies", "independent")),
        ("_prefill_and_decode", without_the_end_token, ("draws that are a completion",)),
    ],
)
def test_a_broken_sampler_is_seen(monkeypatch, part, broken, fails):
    break_(monkeypatch, rlft.rollout.engine if part.startswith("_") else rlft.rollout.sampling, part, broken)
    check(guarded("sampler", sampled.engine), fails=fails)


@pytest.mark.parametrize(("broken", "algorithm"), [(same_for_all_members, "rloo"), (cold, "reinforce")])
def test_a_biased_sampler_is_seen_in_the_expected_gradient(monkeypatch, broken, algorithm):
    if broken is cold:  # too little to stop the run, enough to bend the gradient
        monkeypatch.setattr(rlft.algos.online.scoring, "MAX_LOGPROB_DIFFERENCE", 10.0)
        break_(monkeypatch, rlft.rollout.sampling, "sample", broken)
    else:
        break_(monkeypatch, rlft.rollout.sampling, "uniforms", broken)
    check(drawn(algorithm), fails=("sampled groups, along the exact one",))


def test_states_shifted_by_one_are_seen(monkeypatch):
    right = rlft.models.scorer.predictors
    monkeypatch.setattr(rlft.models.scorer, "predictors", lambda policy, rows: right(policy, rows).roll(1, 0))
    check(gradients("rloo"), fails=(FIRST,))


def test_an_entropy_bonus_of_the_wrong_sign_is_seen(monkeypatch):
    right = rlft.models.scorer.Scorer.forward

    def forward(self, rows, **settings):
        scores = right(self, rows, **settings)
        return replace(scores, entropy=-scores.entropy)

    monkeypatch.setattr(rlft.models.scorer.Scorer, "forward", forward)
    check(gradients("reinforce, entropy bonus"), fails=(FIRST, EXPECTED))


def test_refilling_that_keeps_groups_without_a_spread_is_seen(monkeypatch):
    break_(monkeypatch, rlft.algos.online.rollouts, "group_std", lambda right, rewards, group_size: torch.ones(1))
    check(guarded("dapo", lambda: refill.rows_of(case_of("dapo"))), fails=("refilled groups",))


# What the measuring itself rests on, and where training ends.


def test_a_wrong_optimum_is_seen(monkeypatch):
    break_(
        monkeypatch, exact, "optimum", lambda right, ref_logp, rewards, beta: right(ref_logp, rewards, beta=2 * beta)
    )
    rows = guarded("optimum", optimum.rows)
    check(
        rows, fails=("beta 1: E[r]", "100,000 completions", "two prompts: J(pi)"), passes=("score function, in a loop",)
    )


def course(name: str) -> training.Course:
    (found,) = (one for one in training.courses() if (one.case.algo, one.name) == (name, "token count"))
    return found


def test_an_algorithm_that_does_not_learn_is_seen(monkeypatch):
    break_(monkeypatch, advantages, "leave_one_out", lambda right, rewards, group_size: torch.zeros_like(rewards))
    rows = training.trained(course("rloo")).rows()
    check(rows, fails=("J* - J",), passes=("above the frontier at its KL", "its own evaluation"))


def test_an_evaluation_that_counts_half_the_kl_is_seen(monkeypatch):
    def half(right, **a) -> Tensor:
        return 0.5 * right(**a)

    break_(monkeypatch, rlft.algos.online.evaluation, "exact_token_kl", half)
    rows = training.trained(course("rloo")).rows()
    check(rows, fails=("its own evaluation",), passes=("J* - J", "above the frontier at its KL"))


def test_nothing_fails_where_nothing_is_broken():
    assert all(row.is_right for row in [*gradients("rloo"), *unchanged("rloo"), *drawn("rloo")])
    assert all(row.is_right for row in guarded("dapo", lambda: refill.rows_of(case_of("dapo"))))
