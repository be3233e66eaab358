"""What the compositions add to GRPO, RLOO, Dr. GRPO and REINFORCE, against loops written from the papers' formulas."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch

from rlft.algos.online.baselines import RunningBaseline
from rlft.core.batch import Denominators
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from tests.algos.micro import build, completions, distributions, eighths, frozen_distributions, gradient, loss_of
from tests.builders import TOKENIZER, Float64Rewards, perturbed, reward_sum
from tests.oracles.loops import discounted_returns, gae, group_advantages, whiten

ONLINE = [
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "bnpo",
    "ppo",
    "raft",
    "rwr",
]


def binary(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def made(name: str, *overrides: str, **arguments):
    if name == "bnpo":
        arguments = {"rewards": reward_sum(binary, cls=Float64Rewards)} | arguments
    return build(name, *overrides, **arguments)


def log_ratios(algorithm, batch) -> list[list[float]]:
    """Log of policy over reference at each sampled token, from plain forwards, padded with zeros."""
    width = batch.rows.completion_mask.shape[1]
    rows = []
    for i, ids in enumerate(completions(batch)):
        logp, _ = frozen_distributions(algorithm.run.policy, batch, i, 0.8)
        logq, _ = frozen_distributions(algorithm.run.reference, batch, i, 0.8)
        rows.append([float(logp[t, a] - logq[t, a]) for t, a in enumerate(ids)] + [0.0] * (width - len(ids)))
    return rows


def token_rewards(algorithm, batch, coef: float) -> list[list[float]]:
    rows = [[-coef * d for d in row] for row in log_ratios(algorithm, batch)]
    for row, ids, reward in zip(rows, completions(batch), eighths(completions(batch)), strict=True):
        row[len(ids) - 1] += reward
    return rows


def expected_advantages(name: str, algorithm, batch) -> list[list[float]]:
    mask = batch.rows.completion_mask.tolist()
    rewards = (binary if name == "bnpo" else eighths)(completions(batch))
    if name in ("reinforce_pp", "ppo"):
        tokens = token_rewards(algorithm, batch, 0.5)
        zeros = [[0.0] * len(row) for row in tokens]  # the critic starts at zero
        raw = (
            discounted_returns(tokens, mask, 1.0) if name == "reinforce_pp" else gae(tokens, zeros, mask, 1.0, 0.95)[0]
        )
        return whiten(raw, mask, True)
    if name == "remax":
        prompts = [
            batch.rows.prompt_ids[p, : int(batch.rows.prompt_lengths[p])].tolist()
            for p in range(len(batch.rows.prompt_ids))
        ]
        greedy = Sampling(algorithm.run.sampling.max_new_tokens, 0.8, greedy=True)
        ids = generate(
            algorithm.run.policy, prompts, group_size=1, sampling=greedy, eos_id=TOKENIZER.eos_id, seed=9
        ).completions()
        kls = [sum(row) for row in log_ratios(algorithm, batch)]
        baseline = [eighths([one])[0] for one in ids]
        per_row = [r - 0.5 * kl - baseline[i // 3] for i, (r, kl) in enumerate(zip(rewards, kls, strict=True))]
    elif name == "raft":
        groups = [rewards[i : i + 3] for i in (0, 3)]
        per_row = [float(j == group.index(max(group))) for group in groups for j in range(3)]
    elif name == "rwr":
        sums = [sum(math.exp(r / 0.2) for r in rewards[i : i + 3]) for i in (0, 3)]
        per_row = [3 * math.exp(r / 0.2) / sums[i // 3] for i, r in enumerate(rewards)]
    elif name == "reinforce_pp_baseline":
        centred = group_advantages(rewards, 3, "mean")
        return whiten([[a] * len(row) for a, row in zip(centred, mask, strict=True)], mask, True)
    else:
        per_row = group_advantages(rewards, 3, "zscore")
    return [[a if keep else 0.0 for keep in row] for a, row in zip(per_row, mask, strict=True)]


@pytest.mark.parametrize("name", [name for name in ONLINE if name != "bnpo"])  # its part has a test of its own
def test_advantages_equal_a_naive_loop(name):
    algorithm = made(name)
    batch = algorithm.collect(1)
    assert len(set(batch.rows.completion_mask.sum(1).tolist())) > 1  # padding is there
    expected = torch.tensor(expected_advantages(name, algorithm, batch), dtype=torch.float64)
    torch.testing.assert_close(batch.values["advantages"], expected, rtol=1e-9, atol=1e-11)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 4}, {"max_tokens": 17}])
def test_shares_of_micro_batches_add_up_to_the_whole_gradient(name, limits):
    algorithm = made(name)
    batch, policy = algorithm.collect(1), algorithm.run.policy
    if algorithm.head is not None:  # a critic that has learnt something
        perturbed(algorithm.head, seed=3, spread=0.1)
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    whole, means = Metrics(), Metrics()
    scorer = Scorer(policy, algorithm.head)
    expected = gradient(algorithm.loss(scorer, batch, totals, whole, update=0), scorer)
    got = torch.zeros_like(expected)
    for micro in batch.micro_batches(**limits):
        got += gradient(algorithm.loss(scorer, micro, totals, means, update=0), scorer)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert means.local() == pytest.approx(whole.local(), rel=1e-10, abs=1e-12)


def test_exact_kl_in_the_loss_has_the_gradient_of_the_enumerated_kl():
    algorithm = build("dr_grpo", "algo/kl=exact", "algo.kl.coef=0.5", "algo/aggregation=token_mean")
    free = build("dr_grpo", "algo/aggregation=token_mean", policy=algorithm.run.policy)
    batch, means = algorithm.collect(1), Metrics()
    loss = loss_of(algorithm, batch, update=0, metrics=means) - loss_of(free, batch, update=0)
    terms = []
    for i, ids in enumerate(completions(batch)):
        logp, _ = distributions(algorithm.run.policy, batch, i, 0.8)
        logq, _ = frozen_distributions(algorithm.run.reference, batch, i, 0.8)
        terms += [(logp[t].exp() * (logp[t] - logq[t])).sum() for t in range(len(ids))]
    expected = torch.stack(terms).mean()
    value = pytest.approx(expected.item(), rel=1e-10)
    assert (means.local()["kl"], means.local()["kl_exact"]) == (value, value)
    torch.testing.assert_close(loss, 0.5 * expected, rtol=1e-9, atol=1e-12)
    wanted = gradient(0.5 * expected, algorithm.run.policy)
    torch.testing.assert_close(gradient(loss, algorithm.run.policy), wanted, rtol=1e-7, atol=1e-11)


# PPO: critic, epochs, mini-batches.


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_value_loss_is_the_mean_clipped_square_over_the_batchs_tokens(critic):
    algorithm = build("ppo", f"algo/critic={critic}", "algo.value_coef=0.7", "algo.value_clip=0.05")
    batch, means = algorithm.collect(1), Metrics()
    mask = batch.rows.completion_mask
    assert not batch.values["old_values"].any()  # the head starts at zero: returns are the targets
    perturbed(algorithm.head, seed=3, spread=0.2)
    scorer = Scorer(algorithm.run.policy, algorithm.head)
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    algorithm.loss(scorer, batch, totals, means, update=1)
    values, total = scorer(batch.rows, temperature=0.8).values.detach(), 0.0
    for v, target in zip(values[mask].tolist(), batch.values["returns"][mask].tolist(), strict=True):
        total += max((v - target) ** 2, (max(-0.05, min(0.05, v)) - target) ** 2) / 2
    assert means.local()["loss/value"] == pytest.approx(total / int(mask.sum()), rel=1e-10)
    assert 0 < means.local()["val/clipfrac"] < 1


def test_a_separate_critics_loss_leaves_the_policy_alone_and_a_shared_ones_does_not():
    for critic, is_alone in (("separate", True), ("shared", False)):
        algorithm = build("ppo", f"algo/critic={critic}", "algo.kl.coef=0")
        batch = algorithm.collect(1)
        perturbed(algorithm.head, seed=3, spread=0.2)
        batch.values["advantages"].zero_()
        totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
        algorithm.loss(Scorer(algorithm.run.policy, algorithm.head), batch, totals, Metrics(), update=0).backward()
        grads = [p.grad for p in algorithm.run.policy.parameters() if p.grad is not None]
        assert all(not grad.any() for grad in grads) == is_alone
        assert any(p.grad.any() for p in algorithm.head.parameters())


def test_each_epoch_goes_once_through_the_batch_in_an_order_of_its_own():
    algorithm = build("ppo", "algo.epochs=2", "algo.minibatches=3")
    batch = algorithm.collect(1)
    batch.values["row"] = torch.arange(6)
    parts = [algorithm.minibatch(batch, update, before={}).values["row"].tolist() for update in range(6)]
    assert all(len(part) == 2 for part in parts)
    assert sorted(chain(*parts[:3])) == sorted(chain(*parts[3:])) == list(range(6))
    assert parts[:3] != parts[3:]
    again = build("ppo", "algo.epochs=2", "algo.minibatches=3")
    other = again.collect(2)
    other.values["row"] = torch.arange(6)
    assert [again.minibatch(other, update, before={}).values["row"].tolist() for update in range(6)] != parts


def test_mini_batches_follow_from_their_own_batch_whichever_was_drawn_last():
    algorithm = build("ppo", "algo.epochs=2", "algo.minibatches=3")
    batches = [algorithm.collect(index) for index in range(2)]
    for batch in batches:
        batch.values["row"] = torch.arange(6)

    def parts(batch) -> list[list[int]]:
        return [algorithm.minibatch(batch, update, before={}).values["row"].tolist() for update in range(6)]

    first = parts(batches[0])
    assert parts(batches[1]) != first
    algorithm.collect(2)
    assert parts(batches[0]) == first


def test_updates_that_are_left_are_passed_over_above_the_target_kl():
    algorithm = build("ppo", "algo.target_kl=0.001")
    batch = algorithm.collect(1)
    scorer = Scorer(algorithm.run.policy, algorithm.head)
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)

    def updated(update: int) -> dict[str, float]:
        metrics = Metrics()
        algorithm.loss(scorer, batch, totals, metrics, update=update)
        return metrics.local()

    assert algorithm.minibatch(batch, 0, before={}) is batch
    assert algorithm.minibatch(batch, 1, before=updated(0)) is batch  # nothing has moved yet
    perturbed(algorithm.run.policy, seed=5, spread=0.1)
    before = updated(1)
    assert algorithm.minibatch(batch, 2, before=before) is None
    assert algorithm.minibatch(batch, 3, before=before) is None  # a step that is passed over has no metrics of its own
    assert algorithm.minibatch(algorithm.collect(2), 0, before={}) is not None


def test_the_target_kl_is_compared_with_the_whole_mini_batch_where_rows_without_advantage_could_be_left_out():
    def moved(*overrides: str) -> tuple[float, float]:
        rewards = reward_sum(lambda completion_ids, **_: [0.0] * 3 + eighths(completion_ids)[3:], cls=Float64Rewards)
        algorithm = build("dr_grpo", "algo.epochs=3", *overrides, rewards=rewards, reference=None)
        batch, means = algorithm.collect(1), Metrics()
        assert not batch.values["advantages"][:3].any()
        perturbed(algorithm.run.policy, seed=5, spread=0.1)
        totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
        algorithm.loss(Scorer(algorithm.run.policy), algorithm.needed(batch), totals, means, update=1)
        old, mask = batch.values["old_logprobs"], batch.rows.completion_mask
        new = [frozen_distributions(algorithm.run.policy, batch, i, 0.8)[0] for i in range(6)]
        ratios = [
            float(old[i, t] - new[i][t, token])
            for i, ids in enumerate(completions(batch))
            for t, token in enumerate(ids)
        ]
        whole = sum(math.exp(-d) - 1 + d for d in ratios) / int(mask.sum())  # k3 of each token that was sampled
        return means.local()["policy/approxkl"], whole

    measured, whole = moved("algo.target_kl=0.001")
    assert measured == pytest.approx(whole, rel=1e-9)
    measured, whole = moved()
    assert measured != pytest.approx(whole, rel=1e-2)  # of the rows that the update kept


# DAPO: groups without spread are drawn again.


def only_some_prompts(prompts, completion_ids, **_):
    """Spread for prompts that begin with a or c only."""
    return [r if p[0] in "ac" else 0.0 for p, r in zip(prompts, eighths(completion_ids), strict=True)]


PROMPTS = ("abc", "d", "efghi", "cj", "aa", "bdfhj", "ca", "g")


def test_groups_without_spread_are_replaced_by_those_of_further_prompts():
    rewards = reward_sum(only_some_prompts, cls=Float64Rewards)
    algorithm = build("dapo", rewards=rewards, prompts=PROMPTS)
    batch = algorithm.collect(0)
    first = batch.rows.prompt_ids[:, 0].tolist()
    assert [TOKENIZER.decode([i]) for i in first] in (["a", "a"], ["a", "c"], ["c", "a"], ["c", "c"])
    assert batch.metrics.local()["frac_reward_zero_std"] == 0
    assert batch.metrics.local()["sampling/draws"] > 1
    assert (batch.values["advantages"].abs().sum(1) > 0).all()


def test_refilling_goes_on_where_a_resumed_run_stopped():
    def fresh():
        return build("dapo", rewards=reward_sum(only_some_prompts, cls=Float64Rewards), prompts=PROMPTS)

    whole = fresh()
    whole.collect(0)
    state, second = whole.state_dict(), whole.collect(1)
    resumed = fresh()
    resumed.load_state_dict(state)
    again = resumed.collect(1)
    assert completions(again) == completions(second)
    assert torch.equal(again.values["advantages"], second.values["advantages"])


def test_refilling_ends_after_the_given_draws_and_fills_up_with_what_there_is():
    rewards = reward_sum(lambda completions, **_: [0.0] * len(completions), cls=Float64Rewards)
    algorithm = build("dapo", "algo.resample_zero_std=3", rewards=rewards, prompts=PROMPTS)
    batch = algorithm.collect(0)
    assert (batch.num_rows, batch.metrics.local()["sampling/draws"]) == (6, 3)
    assert not batch.values["advantages"].any()


# Baselines and schedules that remember.


def test_running_baseline_is_a_mean_of_earlier_batches_only():
    part = RunningBaseline(gamma=1.0, decay=0.75)
    mask = torch.tensor([[True, True], [True, False]])
    rewards = torch.tensor([[0.0, 2.0], [5.0, 99.0]], dtype=torch.float64)  # returns 2, 2 and 5: mean 3
    assert part(rewards, mask).tolist() == [[2, 2], [5, 0]]
    assert part(2 * rewards, mask).tolist() == [[1, 1], [7, 0]]  # minus 3
    assert part.mean == pytest.approx(0.75 * 3 + 0.25 * 6)
    again = RunningBaseline(gamma=1.0, decay=0.75)
    again.load_state_dict(part.state_dict())
    assert torch.equal(again(rewards, mask), part(rewards, mask))
    plain = RunningBaseline(decay=None)
    for factor in (1, 2, 6):
        plain(factor * rewards, mask)
    assert plain.mean == pytest.approx((3 + 6 + 18) / 3)


def test_entropy_bonus_falls_to_zero():
    algorithm = build("grpo", "algo.entropy_coef=0.4", "algo.entropy_decay_batches=4")
    seen = [algorithm.collect(index).coefs["entropy"] for index in (0, 1, 4, 9)]
    assert seen == pytest.approx([0.4, 0.3, 0.0, 0.0])
