"""Each part is broken on purpose, and `verify` fails at the row that is about it, and (where told) not at another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlft.algos.baselines
import rlft.algos.evaluation
import rlft.algos.reference
import rlft.algos.rollouts
import rlft.models.scorer
import rlft.rollout.engine
import rlft.trainer.batch
from rlft.functional import advantages, aggregation, surrogates, weights
from rlft.functional import kl as divergences
from rlft.verify import divergence, exact, groups, invariance, optimum, refill, sampled, training
from rlft.verify.cases import CASES
from rlft.verify.rows import Row
from rlft.verify.run import guarded

FIRST, SECOND, EXPECTED = "gradient of each", "at a second update", "E[gradient] over all batches"
CUT, PADDED, ORDERED = "micro-batches of", "more padding", "another order"


def case_of(name: str):
    (case,) = (case for case in CASES if case.name == name)
    return case


def gradients(name: str) -> list[Row]:
    is_small = name != "dr_grpo"  # whose constant length is the longest completion's in the small ones
    return guarded(name, lambda: groups.rows_of(case_of(name), is_small=is_small))


def unchanged(name: str) -> list[Row]:
    return guarded(name, lambda: invariance.rows_of(case_of(name)))


def drawn(name: str) -> list[Row]:
    return guarded(name, lambda: sampled.gradients(case_of(name)))


def break_(monkeypatch, module: Any, name: str, broken: Callable[..., Any]) -> None:
    """Replace a function by `broken(the right one, **arguments)`, under its signature: parts are called by names."""
    right = getattr(module, name)
    signature = inspect.signature(right)

    @functools.wraps(right)
    def call(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        return broken(right, **bound.arguments)

    monkeypatch.setattr(module, name, call)


def check(rows: list[Row], *, fails: tuple[str, ...], passes: tuple[str, ...] = ()) -> None:
    wrong = [row.claim for row in rows if not row.is_right]
    assert wrong, "the broken part was not seen"
    for text in fails:
        assert any(text in claim or claim.startswith("raised") for claim in wrong), (text, wrong)
    for text in passes:
        assert any(text in row.claim for row in rows) and not any(text in claim for claim in wrong), (text, wrong)


def negated(right, **arguments):
    loss, statistics = right(**arguments)
    return -loss, statistics


# Surrogates.


def pessimism_lost(right, logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip):
    ratio, a = (logprobs - old_logprobs).exp(), advantages.expand_as(logprobs)
    return -torch.maximum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a), {}


def bounds_swapped(right, **a):
    return right(**(a | {"clip_low": a["clip_high"], "clip_high": a["clip_low"]}))


def dual_clip_lost(right, **a):
    return right(**(a | {"dual_clip": None}))


def weight_not_clipped(right, **a):
    return right(**(a | {"clip_high": 1e9}))


def weight_with_gradient(right, logprobs, old_logprobs, advantages, clip_high, clip_low):
    return -(logprobs - old_logprobs).exp().clamp(max=clip_high) * advantages * logprobs, {}


def ratio_not_averaged(right, logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(1, keepdim=True).exp().expand_as(logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages), {}


def gates_swapped(right, **a):
    return right(**(a | {"tau_pos": a["tau_neg"], "tau_neg": a["tau_pos"]}))


def off_policy(right, **a):
    return right(**(a | {"old_logprobs": a["logprobs"].detach()}))


def value_not_clipped(right, **a):
    return right(**(a | {"clip": float("inf")}))


@pytest.mark.parametrize(
    ("part", "broken", "algorithm", "fails", "passes"),
    [
        ("score_function", negated, "rloo", (FIRST, EXPECTED), ()),
        ("clipped", negated, "grpo", (FIRST, SECOND, EXPECTED), ()),
        ("clipped", pessimism_lost, "grpo", (SECOND,), (FIRST, EXPECTED)),
        ("clipped", bounds_swapped, "dapo", (SECOND,), (FIRST, EXPECTED)),
        ("clipped", off_policy, "dr_grpo", (SECOND,), (FIRST, EXPECTED)),
        ("clipped", dual_clip_lost, "grpo, dual clip", (SECOND,), (FIRST,)),
        ("cispo", weight_not_clipped, "cispo", (SECOND,), (FIRST,)),
        ("cispo", weight_with_gradient, "cispo", (FIRST, SECOND), ()),
        ("sequence_ratio", ratio_not_averaged, "gspo", (FIRST, SECOND), ()),
        ("sapo", gates_swapped, "sapo", (SECOND,), (FIRST,)),
        ("sapo", off_policy, "sapo", (SECOND,), (FIRST,)),
    ],
)
def test_a_broken_surrogate_is_seen(monkeypatch, part, broken, algorithm, fails, passes):
    break_(monkeypatch, surrogates, part, broken)
    check(gradients(algorithm), fails=fails, passes=passes)


def test_a_value_loss_without_its_clip_is_seen(monkeypatch):
    break_(monkeypatch, rlft.algos.policy_gradient, "value_clipped", value_not_clipped)
    check(gradients("ppo"), fails=(SECOND,), passes=(FIRST, EXPECTED))


# Advantages.


def raw(right, rewards, **_):
    return rewards


def ddof_0(right, rewards, group_size, eps):
    of_groups = rewards.view(-1, group_size)
    std = of_groups.std(1, correction=0, keepdim=True)
    return ((of_groups - of_groups.mean(1, keepdim=True)) / (std + eps)).flatten()


def own_reward_left_in(right, rewards, group_size):
    of_groups = rewards.view(-1, group_size)
    return (of_groups - of_groups.mean(1, keepdim=True)).flatten()


def mean_in_place_of_greedy(right, rewards, greedy_rewards):
    return rewards - rewards.mean()


def worst(right, rewards, group_size):
    return right(-rewards, group_size=group_size)


def own_return_left_in(right, rewards, mask, group_size, gamma):
    """Still a baseline that the token itself moves: a bias."""
    return right(rewards, mask, group_size=group_size, gamma=gamma) * (group_size - 1) / group_size


def weights_sum_to_one(right, rewards, group_size, beta):
    return right(rewards, group_size=group_size, beta=beta) / group_size


def beta_of_everything(right, rewards, group_size):
    return right(rewards, group_size=group_size).mul(1.1)


def no_bootstrap(right, rewards, values, mask, gamma, lam):
    return right(rewards, values, mask, gamma=gamma, lam=0.0)


def past_rewards_too(right, rewards, mask, gamma):
    return torch.where(mask, right(rewards, mask, gamma=gamma)[:, :1], 0.0)


def no_discount(right, rewards, mask, gamma):
    return right(rewards, mask, gamma=1.0)


def whitened_with_padding(right, x, mask, shift_mean):
    return (x - x.mean()) / (x.var() + 1e-8).sqrt()


def whitened_with_ddof_0(right, x, mask, shift_mean):
    return torch.where(mask, (x - x[mask].mean()) / (x[mask].var(correction=0) + 1e-8).sqrt(), 0.0)


@pytest.mark.parametrize(
    ("part", "broken", "algorithm", "fails", "passes"),
    [
        ("leave_one_out", raw, "rloo", (FIRST,), (EXPECTED,)),  # no baseline: more variance, and no bias
        ("leave_one_out", own_reward_left_in, "rloo", (FIRST, EXPECTED), ()),
        ("group_zscore", ddof_0, "grpo", (FIRST, SECOND), ()),
        ("group_zscore", raw, "dapo", (FIRST, EXPECTED), ()),
        ("group_mean", raw, "dr_grpo", (FIRST, EXPECTED), ()),
        ("greedy_baseline", mean_in_place_of_greedy, "remax", (FIRST, EXPECTED), ()),
        ("best_of_group", worst, "raft", (FIRST, EXPECTED), ()),
        ("reward_weighted", weights_sum_to_one, "rwr", (FIRST,), ()),
        ("beta_normalized", beta_of_everything, "bnpo", (FIRST,), ()),
        ("gae", no_bootstrap, "ppo", (FIRST,), ()),
        ("gae", no_bootstrap, "ppo, lambda 1", (FIRST, EXPECTED), ()),
        ("group_returns", own_return_left_in, "token_rloo, returns", (FIRST, EXPECTED), ()),
        ("discounted_returns", past_rewards_too, "reinforce_pp", (FIRST,), ()),
        ("discounted_returns", no_discount, "reinforce, gamma 0.9", (FIRST,), ()),
    ],
)
def test_a_broken_advantage_is_seen(monkeypatch, part, broken, algorithm, fails, passes):
    module = weights if part in ("best_of_group", "reward_weighted") else advantages
    break_(monkeypatch, module, part, broken)
    check(gradients(algorithm), fails=fails, passes=passes)


@pytest.mark.parametrize("broken", [whitened_with_padding, whitened_with_ddof_0])
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_pp_baseline"])
def test_a_broken_whitening_is_seen(monkeypatch, broken, algorithm):
    break_(monkeypatch, rlft.algos.policy_gradient, "whiten", broken)
    check(gradients(algorithm), fails=(FIRST,))
    if broken is whitened_with_padding:
        check(unchanged(algorithm), fails=(PADDED,), passes=(CUT, ORDERED))


def test_a_baseline_that_holds_its_own_batch_is_seen(monkeypatch):
    def own_batch(self, rewards, mask):
        returns = advantages.discounted_returns(rewards, mask, gamma=self.gamma)
        return torch.where(mask, returns - returns[mask].mean(), 0.0)

    monkeypatch.setattr(rlft.algos.baselines.RunningBaseline, "__call__", own_batch)
    check(gradients("reinforce, running baseline"), fails=(FIRST, EXPECTED))


# Denominators.


def over_the_width(right, x, mask, num_sequences):
    return torch.where(mask, x, 0.0).sum() / x.shape[1] / num_sequences


def of_its_own_tokens(right, x, mask, num_tokens):
    return right(x, mask)


def of_its_own_rows(right, **a):
    return right(**(a | {"num_sequences": None}))


def over_the_longest(right, x, mask, length, num_sequences):
    return right(x, mask, length=float(mask.sum(1).max()), num_sequences=num_sequences)


def mask_off_by_one(right, x, mask, **counts):
    return right(x, mask.roll(1, 1), **counts)


@pytest.mark.parametrize(
    ("part", "broken", "algorithm", "in_gradients", "in_invariance"),
    [
        ("sequence_mean", over_the_width, "grpo", (FIRST, SECOND), (CUT, PADDED)),
        ("sequence_mean", of_its_own_rows, "gspo", (), (CUT,)),
        ("token_mean", of_its_own_tokens, "dapo", (), (CUT,)),
        ("sequence_sum", of_its_own_rows, "rloo", (), (CUT,)),
        ("constant", over_the_longest, "dr_grpo", (FIRST, EXPECTED), (CUT,)),
        ("token_mean", mask_off_by_one, "cispo", (FIRST, SECOND), (PADDED,)),
    ],
)
def test_a_wrong_denominator_or_mask_is_seen(monkeypatch, part, broken, algorithm, in_gradients, in_invariance):
    break_(monkeypatch, aggregation, part, broken)
    check(unchanged(algorithm), fails=in_invariance, passes=(ORDERED,))
    if in_gradients:
        check(gradients(algorithm), fails=in_gradients)
    else:
        assert all(row.is_right for row in gradients(algorithm))  # the whole batch has the right counts


def test_rows_lost_between_micro_batches_are_seen(monkeypatch):
    def all_but_the_last(self, **limits):
        micro_batches = list(right(self, **limits))
        return iter(micro_batches[:-1] or micro_batches)

    right = rlft.trainer.batch.Batch.micro_batches
    monkeypatch.setattr(rlft.trainer.batch.Batch, "micro_batches", all_but_the_last)
    check(unchanged("grpo"), fails=(CUT,), passes=(PADDED, ORDERED))
    check(guarded("trainer", invariance.trainer_rows), fails=("grpo: loss and gradient norm", "ppo: loss and"))


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
    monkeypatch.setitem(rlft.algos.kl.ESTIMATORS, part, getattr(divergences, part))
    check(guarded("kl", divergence.rows), fails=fails, passes=passes)
    if part == "k3":
        check(gradients("grpo"), fails=(FIRST, SECOND))


def test_an_exact_kl_in_the_wrong_direction_is_seen(monkeypatch):
    break_(monkeypatch, rlft.algos.scoring, "exact", with_the_reference_first)
    wrong = ("exact in the loss: E[gradient]", "exact in the loss: each")
    check(guarded("kl", divergence.rows), fails=wrong, passes=("k3 in the loss: each",))


def test_a_penalty_of_the_wrong_sign_in_the_reward_is_seen(monkeypatch):
    right = rlft.algos.reference.FrozenSide.sampled_kl
    monkeypatch.setattr(rlft.algos.reference.FrozenSide, "sampled_kl", lambda *a: -right(*a))
    check(gradients("rloo"), fails=(FIRST, EXPECTED))
    check(guarded("kl", divergence.rows), fails=("k1 in the reward: E[gradient]",), passes=("k3 in the loss: each",))


def test_a_kl_in_the_loss_without_a_gradient_is_seen(monkeypatch):
    right = rlft.algos.reference.FrozenSide.token_kl
    monkeypatch.setattr(rlft.algos.reference.FrozenSide, "token_kl", lambda *a: right(*a).detach())
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
    ids, logprobs, counts, stopped = right(**a)
    return ids, logprobs, (counts - stopped.long()).clamp(min=1), stopped


@pytest.mark.parametrize(
    ("part", "broken", "fails"),
    [
        ("sample", cold, ("p-value of their frequencies",)),
        ("sample", one_further, ("p-value of their frequencies",)),
        ("sample", of_the_undivided_logits, ("sampler's logprobs",)),
        ("uniforms", same_for_all_members, ("p-value of their frequencies", "independent")),
        ("_decode", without_the_end_token, ("draws that are a completion",)),
    ],
)
def test_a_broken_sampler_is_seen(monkeypatch, part, broken, fails):
    break_(monkeypatch, rlft.rollout.engine, part, broken)
    check(guarded("sampler", sampled.engine), fails=fails)


@pytest.mark.parametrize(("broken", "algorithm"), [(same_for_all_members, "rloo"), (cold, "reinforce")])
def test_a_biased_sampler_is_seen_in_the_expected_gradient(monkeypatch, broken, algorithm):
    if broken is cold:  # too little to stop the run, enough to bend the gradient
        monkeypatch.setattr(rlft.algos.policy_gradient, "MAX_LOGPROB_DIFFERENCE", 10.0)
        break_(monkeypatch, rlft.rollout.engine, "sample", broken)
    else:
        break_(monkeypatch, rlft.rollout.engine, "uniforms", broken)
    check(drawn(algorithm), fails=("sampled groups, along the exact one",))


def test_states_shifted_by_one_are_seen(monkeypatch):
    right = rlft.models.scorer.predictors
    monkeypatch.setattr(rlft.models.scorer, "predictors", lambda policy, rows: right(policy, rows).roll(1, 1))
    check(gradients("rloo"), fails=(FIRST,))


def test_an_entropy_bonus_of_the_wrong_sign_is_seen(monkeypatch):
    right = rlft.models.scorer.Scorer.forward

    def forward(self, rows, **settings):
        scores = right(self, rows, **settings)
        return replace(scores, entropy=-scores.entropy)

    monkeypatch.setattr(rlft.models.scorer.Scorer, "forward", forward)
    check(gradients("reinforce, entropy bonus"), fails=(FIRST, EXPECTED))


def test_refilling_that_keeps_groups_without_a_spread_is_seen(monkeypatch):
    break_(monkeypatch, rlft.algos.rollouts, "group_std", lambda right, rewards, group_size: torch.ones(1))
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

    break_(monkeypatch, rlft.algos.evaluation, "exact_token_kl", half)
    rows = training.trained(course("rloo")).rows()
    check(rows, fails=("its own evaluation",), passes=("J* - J", "above the frontier at its KL"))


def test_nothing_fails_where_nothing_is_broken():
    assert all(row.is_right for row in [*gradients("rloo"), *unchanged("rloo"), *drawn("rloo")])
    assert all(row.is_right for row in guarded("dapo", lambda: refill.rows_of(case_of("dapo"))))
