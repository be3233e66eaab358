"""Surrogates, advantages and denominators are broken on purpose: `verify` fails at the row that is about each."""

from __future__ import annotations

import pytest
import torch

import rlft.algos.online.baselines
import rlft.algos.online.policy_gradient
import rlft.core.batch
from rlft.functional import advantages, aggregation, surrogates, weights
from rlft.verify import invariance
from rlft.verify.runner import guarded
from tests.verify.breaking import CUT, EXPECTED, FIRST, ORDERED, PADDED, SECOND, break_, check, gradients, unchanged


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
    break_(monkeypatch, rlft.functional.surrogates, "value_clipped", value_not_clipped)
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
    break_(monkeypatch, rlft.algos.online.policy_gradient, "whiten", broken)
    check(gradients(algorithm), fails=(FIRST,))
    if broken is whitened_with_padding:
        check(unchanged(algorithm), fails=(PADDED,), passes=(CUT, ORDERED))


def test_a_baseline_that_holds_its_own_batch_is_seen(monkeypatch):
    def own_batch(self, rewards, mask):
        returns = advantages.discounted_returns(rewards, mask, gamma=self.gamma)
        return torch.where(mask, returns - returns[mask].mean(), 0.0)

    monkeypatch.setattr(rlft.algos.online.baselines.RunningBaseline, "__call__", own_batch)
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

    right = rlft.core.batch.Batch.micro_batches
    monkeypatch.setattr(rlft.core.batch.Batch, "micro_batches", all_but_the_last)
    check(unchanged("grpo"), fails=(CUT,), passes=(PADDED, ORDERED))
    check(guarded("trainer", invariance.trainer_rows), fails=("grpo: loss and gradient norm", "ppo: loss and"))
