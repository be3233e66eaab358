"""The four compositions against a loop that goes token by token through plain forwards, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from rlft.core.batch import Denominators
from rlft.core.errors import ConfigError, NonFiniteError
from rlft.core.metrics import Metrics
from rlft.functional.shapes import PerCompletion
from rlft.models.scorer import Scorer
from tests.algos.micro import MAX_NEW, NAMES, build, completions, distributions, eighths, gradient, loss_of
from tests.builders import Float64Rewards, perturbed, reward_sum
from tests.oracles.loops import group_advantages


def k3(d: Tensor) -> Tensor:
    return torch.exp(-d) - 1 + d


def naive_loss(name: str, algorithm, old_policy, batch, *, entropy_coef: float = 0.0) -> Tensor:
    """The composition's formula, written out; nothing of it comes from rlft.functional."""
    temperature, coef = algorithm.run.sampling.temperature, 0.5
    count, rows = batch.num_rows, []
    for i in range(count):
        logp, ids = distributions(algorithm.run.policy, batch, i, temperature)
        with torch.no_grad():
            old, _ = distributions(old_policy, batch, i, temperature)
            reference, _ = distributions(algorithm.run.reference, batch, i, temperature)
        rows.append([(logp[t], float(old[t, a]), float(reference[t, a]), a) for t, a in enumerate(ids)])
    rewards = eighths(completion_ids=[[token[3] for token in row] for row in rows])
    if name == "rloo":  # less the summed log ratio of the policy that sampled
        rewards = [r - coef * sum(old - ref for _, old, ref, _ in row) for r, row in zip(rewards, rows, strict=True)]
    kind = {"grpo": "zscore", "dr_grpo": "mean", "rloo": "leave_one_out"}.get(name)
    advantages = group_advantages(rewards, 3, kind) if kind else rewards  # every token's return-to-go is the reward
    total = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, advantages, strict=True):
        terms = []
        for logp, old, ref, a in row:
            if name in ("grpo", "dr_grpo"):
                ratio = torch.exp(logp[a] - old)
                term = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            else:
                term = -advantage * logp[a]
            if name == "grpo":
                term = term + coef * k3(logp[a] - ref)
            terms.append(term + entropy_coef * (logp.exp() * logp).sum())
        share = sum(terms) / {"grpo": len(row), "dr_grpo": MAX_NEW}.get(name, 1)
        total = total + share / count
    return total


@pytest.mark.parametrize("update", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_equal_a_naive_loop(name, update):
    algorithm = build(name)
    old_policy = copy.deepcopy(algorithm.run.policy)
    batch = algorithm.collect(1)
    assert len(set(batch.rows.completion_mask.sum(1).tolist())) > 1  # padding is there
    if update:  # as after an optimizer step: ratios on both sides of the clip
        perturbed(algorithm.run.policy, seed=5, spread=0.05)
    means = Metrics()
    loss = loss_of(algorithm, batch, update=update, metrics=means)
    expected = naive_loss(name, algorithm, old_policy, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    got, wanted = gradient(loss, algorithm.run.policy), gradient(expected, algorithm.run.policy)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)
    assert wanted.norm() > 1e-2
    if update and name in ("grpo", "dr_grpo"):
        assert 0 < means.local()["clip_ratio/low_mean"] < 0.5
        assert 0 < means.local()["clip_ratio/high_mean"] < 0.5


@pytest.mark.parametrize("name", ["grpo", "reinforce"])
def test_entropy_bonus_adds_its_gradient(name):
    algorithm = build(name, "algo.entropy_coef=0.3")
    batch = algorithm.collect(1)
    loss = loss_of(algorithm, batch, update=0)
    expected = naive_loss(name, algorithm, copy.deepcopy(algorithm.run.policy), batch, entropy_coef=0.3)
    without = naive_loss(name, algorithm, copy.deepcopy(algorithm.run.policy), batch)
    got, wanted = gradient(loss, algorithm.run.policy), gradient(expected, algorithm.run.policy)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)
    assert (wanted - gradient(without, algorithm.run.policy)).norm() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 4}, {"max_tokens": 17}])
def test_shares_of_micro_batches_add_up_to_the_whole_gradient(name, limits):
    algorithm = build(name)
    batch, policy = algorithm.collect(1), algorithm.run.policy
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    whole, means = Metrics(), Metrics()
    expected = gradient(loss_of(algorithm, batch, update=0, metrics=whole), policy)
    got = torch.zeros_like(expected)
    for micro in batch.micro_batches(**limits):
        got += gradient(algorithm.loss(Scorer(policy), micro, totals, means, update=0), policy)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert means.local() == pytest.approx(whole.local(), rel=1e-10, abs=1e-12)


def test_ratio_is_one_before_the_first_update():
    algorithm = build("grpo")
    means = Metrics()
    loss_of(algorithm, algorithm.collect(1), update=0, metrics=means)
    row = means.local()
    assert row["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert row["clip_ratio/low_mean"] == row["clip_ratio/high_mean"] == row["clip_ratio/region_mean"] == 0.0
    assert row["sampling/sampling_logp_difference/max"] < 1e-12


@pytest.mark.parametrize("surrogate", ["clipped", "cispo"])
def test_gradient_of_a_ratio_before_the_first_update_is_the_score_functions(surrogate):
    plain = build("dr_grpo", "algo/surrogate=score_function")
    batch = plain.collect(1)
    wanted = gradient(loss_of(plain, batch, update=0), plain.run.policy)
    algorithm = build("dr_grpo", f"algo/surrogate={surrogate}", policy=plain.run.policy)
    got = gradient(loss_of(algorithm, batch, update=0), algorithm.run.policy)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


def test_sampler_that_is_not_the_trained_policy_is_an_error():
    algorithm = build("grpo")
    batch = algorithm.collect(1)
    batch.values["old_logprobs"][0, 0] += 2e-3
    with pytest.raises(NonFiniteError, match=r"differ from the trainer's by up to 2\.0e-03 nats"):
        loss_of(algorithm, batch, update=0)
    loss_of(algorithm, batch, update=1)  # from the second update on the two do differ
    batch.values["old_logprobs"][0, 0] -= 1.5e-3
    loss_of(algorithm, batch, update=0)


def test_difference_to_the_sampler_outside_the_mask_is_none():
    algorithm = build("grpo")
    batch = algorithm.collect(1)
    batch.values["old_logprobs"][~batch.rows.completion_mask] = 7.0
    loss_of(algorithm, batch, update=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_no_reward_counts_has_no_advantage_and_poisons_nothing(name):
    def some(completion_ids, **_):
        return [None if i in (1, 3, 4, 5) else reward for i, reward in enumerate(eighths(completion_ids))]

    algorithm = build(name, rewards=reward_sum(some, cls=Float64Rewards))
    batch = algorithm.collect(1)
    advantages, rewards = batch.values["advantages"], eighths(completions(batch))
    assert advantages.isfinite().all()
    assert (advantages[[1, 3, 4, 5]] == 0).all()
    assert advantages[0].any()
    row = batch.metrics.local()
    assert row["reward"] == row["rewards/r/mean"] == pytest.approx((rewards[0] + rewards[2]) / 2, rel=1e-12)
    std = abs(rewards[0] - rewards[2]) / math.sqrt(2)  # the first group's two; the second group has none
    assert row["reward_std"] == pytest.approx(std / 2, rel=1e-12)
    assert row["frac_reward_zero_std"] == 0.5
    assert gradient(loss_of(algorithm, batch, update=0), algorithm.run.policy).isfinite().all()


def test_a_row_that_no_reward_counts_has_no_advantage_whatever_the_part_gives_it():
    def ones(rewards: PerCompletion) -> PerCompletion:
        return torch.ones_like(rewards)

    rewards = reward_sum(lambda completions, **_: [1.0, None, 1.0, None, 1.0, 1.0])
    batch = build("dr_grpo", rewards=rewards, parts={"advantage": ones}).collect(1)
    assert batch.values["advantages"][:, 0].tolist() == [1, 0, 1, 0, 1, 1]


def test_groups_of_equal_rewards_have_no_advantage():
    algorithm = build("grpo", rewards=reward_sum(lambda completions, **_: [0.7, 0.7, 0.7, 0.3, 0.3, 0.3 + 1e-6]))
    batch = algorithm.collect(1)
    assert batch.values["advantages"].any(dim=1).tolist() == [False] * 3 + [True] * 3
    assert batch.metrics.local()["frac_reward_zero_std"] == 0.5


def test_lengths_and_reasons_are_counted_as_they_are():
    batch = build("grpo").collect(1)
    lengths = [len(ids) for ids in completions(batch)]
    clipped = [ids[-1] != 11 for ids in completions(batch)]  # 11 is the end token
    row = batch.metrics.local()
    assert row["completions/mean_length"] == pytest.approx(sum(lengths) / 6, rel=1e-12)
    assert row["completions/max_length"] == max(lengths)
    assert row["completions/clipped_ratio"] == pytest.approx(sum(clipped) / 6, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "overrides", "arguments", "message"),
    [
        ("grpo", (), {"reference": None}, "a KL penalty needs a reference"),
        ("rloo", (), {"reference": None}, "a KL penalty needs a reference"),
        ("grpo", ("algo.kl.estimator=k1",), {}, "k1 in the loss holds nothing"),
        ("grpo", ("algo.top_k=3",), {}, "allow_bent_sampling"),
        ("grpo", ("algo.top_p=0.9",), {}, "allow_bent_sampling"),
        ("grpo", ("algo.min_new_tokens=2",), {}, "allow_bent_sampling"),
        ("rloo", ("algo.epochs=2",), {}, "needs a surrogate with a ratio"),
        ("grpo", (), {"world_size": 3}, "must be a multiple of the 3 processes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(name, overrides, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(name, *overrides, **arguments)


def test_a_prompt_that_leaves_no_room_for_a_completion_is_refused():
    build("grpo", prompts=("a" * 27, "b"))  # 27 + 5 tokens fill the context of 32
    with pytest.raises(ConfigError, match=r"list:1: a prompt of 28 tokens .* prompts of at most 27 tokens"):
        build("grpo", prompts=("b", "a" * 28))


@pytest.mark.parametrize("advantage", ["group_zscore", "leave_one_out", "group_mean"])
def test_a_group_of_one_is_refused_before_anything_is_sampled(advantage):
    with pytest.raises(ConfigError, match="group_size"):
        build("grpo", f"algo/advantage={advantage}", group_size=1)


def test_plan_says_what_follows_from_the_settings():
    plan = dict(build("grpo").plan())
    assert plan["samples per step"] == "2 prompts x 3 = 6"
    assert plan["new tokens per step"] == "at most 6 x 5 = 30"
    assert plan["KL penalty"] == "0.5 x k3 in the loss"
    assert plan["rewards"] == "1 x r"
