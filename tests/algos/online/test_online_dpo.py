"""Online DPO: which completions become pairs, and its loss against plain forwards of single rows, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft import build
from rlft.core.errors import ConfigError, NonFiniteError
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from tests.algos.micro import completions, eighths
from tests.algos.offline.builders import build_offline, gradient, reference, totals
from tests.builders import (
    FixedPrompts,
    Float64Rewards,
    algorithm_node,
    perturbed,
    reward_sum,
    rows_of,
    tiny,
    trainer,
)
from tests.models.tiny import plain_logprobs

TEMPERATURE = 0.8
PROMPTS = ["abc", "d", "efghi", "jk"]


def made(*overrides: str, rewards=None, prompts_per_step: int = 3, group_size: int = 4, **given):
    defaults = {"reference": reference(), "data": FixedPrompts(PROMPTS), "temperature": TEMPERATURE}
    return build_offline(
        "online_dpo", "algo.beta=0.3", *overrides, prompts_per_step=prompts_per_step, group_size=group_size,
        max_new_tokens=5, rewards=reward_sum(rewards or eighths, cls=Float64Rewards), **(defaults | given),
    )  # fmt: skip


def groups_of(algorithm, batch) -> list[tuple[list[int], list[list[int]]]]:
    """Each prompt's ids with the ids of its completions."""
    rows, size, found = batch.rows, algorithm.run.settings.group_size, []
    for p, ids in enumerate(rows.prompt_ids.tolist()):
        found.append((ids[: int(rows.prompt_lengths[p])], completions(batch)[p * size : (p + 1) * size]))
    return found


def naive_pairs(groups, score) -> list[tuple[list[int], list[int], list[int]]]:
    """The completions of largest and smallest reward of each group that has two, Python's max and min."""
    found = []
    for prompt, group in groups:
        rewards = score(group)
        if max(rewards) > min(rewards):
            found.append((prompt, group[rewards.index(max(rewards))], group[rewards.index(min(rewards))]))
    return found


def naive_loss(algorithm, pairs, num_prompts: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for prompt, chosen, rejected in pairs:
        h = torch.zeros((), dtype=torch.float64)
        for ids, sign in ((chosen, 1), (rejected, -1)):
            with torch.no_grad():
                ref = plain_logprobs(algorithm.run.reference, prompt, ids, temperature=TEMPERATURE).sum()
            h = h + sign * (plain_logprobs(algorithm.run.policy, prompt, ids, temperature=TEMPERATURE).sum() - ref)
        total = total + torch.log1p(torch.exp(-0.3 * h))
    return total / num_prompts


def loss_of(algorithm, batch, metrics: Metrics | None = None) -> Tensor:
    return algorithm.loss(Scorer(algorithm.run.policy), batch, totals(batch), metrics or Metrics(), update=0)


def two_groups_tie(completion_ids, **_):
    """The middle group of three has spread, its best and worst reward each twice."""
    return [1.0] * 4 + [0.5, 2.0, 2.0, 0.5] + [0.25] * 4


def test_loss_and_gradient_equal_a_naive_loop_over_the_best_and_the_worst_of_each_group():
    algorithm = made()
    for index in range(3):
        everything = algorithm.collect(index)
        batch = algorithm.minibatch(everything, 0, before={})
        pairs = naive_pairs(groups_of(algorithm, everything), lambda ids: eighths(completion_ids=ids))
        assert completions(batch) == [ids for _, chosen, rejected in pairs for ids in (chosen, rejected)]
        loss, expected = loss_of(algorithm, batch), naive_loss(algorithm, pairs, 3)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        got, wanted = gradient(loss, algorithm), gradient(expected, algorithm)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
        assert wanted.norm() > 1e-3


def test_groups_without_spread_are_left_out_and_counted_as_a_loss_of_zero():
    algorithm = made(rewards=two_groups_tie)
    everything, means = algorithm.collect(1), Metrics()
    batch = algorithm.minibatch(everything, 0, before={})
    prompt, group = groups_of(algorithm, everything)[1]
    assert completions(batch) == [group[1], group[0]]  # of equals the first
    expected = naive_loss(algorithm, [(prompt, group[1], group[0])], 3)
    torch.testing.assert_close(loss_of(algorithm, batch, means), expected, rtol=1e-12, atol=0)
    row = everything.metrics.local()
    assert row["objective/scores_margin"] == 1.5
    assert row["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert row["reward"] == pytest.approx((4 + 5 + 1) / 12, rel=1e-12)
    assert means.local()["rewards/accuracies"] in (0.0, 1.0)  # of the one pair


def test_a_batch_without_any_pair_is_a_step_with_no_gradient():
    algorithm, means = made(rewards=lambda completions, **_: [0.5] * len(completions)), Metrics()
    batch = algorithm.minibatch(algorithm.collect(0), 0, before={})
    loss = loss_of(algorithm, batch, means)
    assert batch.num_rows == 2 and float(loss.detach()) == 0.0
    assert not gradient(loss, algorithm).any()
    assert "rewards/margins" not in means.local()


def test_completions_that_no_reward_counts_are_in_no_pair():
    def some(completion_ids, **_):
        return [None, 3.0, 1.0, None] + [None, None, 2.0, None] + [None] * 4

    algorithm = made(rewards=some)
    everything = algorithm.collect(0)
    batch = algorithm.minibatch(everything, 0, before={})
    _, group = groups_of(algorithm, everything)[0]
    assert completions(batch) == [group[1], group[2]]
    assert torch.isfinite(loss_of(algorithm, batch))


@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 5}, {"max_tokens": 25}])
def test_shares_of_micro_batches_add_up_to_the_whole_gradient(limits):
    algorithm = made(prompts_per_step=4)
    batch = algorithm.minibatch(algorithm.collect(1), 0, before={})
    whole, means = Metrics(), Metrics()
    expected = gradient(loss_of(algorithm, batch, whole), algorithm)
    micros, got = list(batch.micro_batches(**limits)), torch.zeros_like(expected)
    assert len(micros) > 1 and all(micro.num_rows % 2 == 0 for micro in micros)
    for micro in micros:
        share = algorithm.loss(Scorer(algorithm.run.policy), micro, totals(batch), means, update=0)
        got += gradient(share, algorithm)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert means.local() == pytest.approx(whole.local(), rel=1e-12, abs=1e-12)


def test_all_sampled_tokens_are_counted_although_only_pairs_are_trained_on():
    algorithm = made()
    everything = algorithm.collect(0)
    assert everything.num_rows == 12
    assert everything.num_tokens == sum(map(len, completions(everything)))
    assert algorithm.minibatch(everything, 0, before={}).num_rows == 6


def test_the_pairs_of_a_batch_stay_after_the_next_was_drawn():
    algorithm = made()
    first = algorithm.collect(0)
    before = completions(algorithm.minibatch(first, 0, before={}))
    second = algorithm.collect(1)
    assert completions(algorithm.minibatch(first, 0, before={})) == before
    assert completions(algorithm.minibatch(second, 0, before={})) != before


def test_logprobs_are_the_current_policys_whoever_sampled():
    algorithm = made(is_float32=False)  # else the policy would have to be the sampler's
    everything = algorithm.collect(1)
    batch = algorithm.minibatch(everything, 0, before={})
    pairs = naive_pairs(groups_of(algorithm, everything), lambda ids: eighths(completion_ids=ids))
    perturbed(algorithm.run.policy, seed=5, spread=0.05)
    torch.testing.assert_close(loss_of(algorithm, batch), naive_loss(algorithm, pairs, 3), rtol=1e-12, atol=0)


def test_sampler_that_is_not_the_trained_policy_is_an_error():
    algorithm, means = made(), Metrics()
    batch = algorithm.minibatch(algorithm.collect(1), 0, before={})
    loss_of(algorithm, batch, means)
    assert means.local()["sampling/sampling_logp_difference/max"] < 1e-12
    batch.values["old_logprobs"][0, 0] += 2e-3
    with pytest.raises(NonFiniteError, match=r"differ from the trainer's by up to 2\.0e-03 nats"):
        loss_of(algorithm, batch)


def test_untouched_policy_is_its_own_reference():
    policy = tiny(9, spread=0.25).double()
    algorithm, means = made(policy=policy, reference=policy), Metrics()
    loss_of(algorithm, algorithm.minibatch(algorithm.collect(0), 0, before={}), means)
    assert means.local()["rewards/margins"] == pytest.approx(0.0, abs=1e-14)
    metrics = algorithm.evaluate().metrics
    assert metrics["eval/kl"] == pytest.approx(0.0, abs=1e-14)
    assert "eval/reward" in metrics


def test_ranks_share_the_prompts_and_add_up(tmp_path):
    sizes = {"prompts_per_step": 4, "rewards": None}
    whole = made(**sizes)
    batch = whole.minibatch(whole.collect(1), 0, before={})
    expected, parts = float(loss_of(whole, batch).detach()), 0.0
    for rank in range(2):
        part = made(rank=rank, world_size=2, **sizes)
        parts += float(loss_of(part, part.minibatch(part.collect(1), 0, before={})).detach())
    assert parts == pytest.approx(expected, rel=1e-12)


def test_a_run_counts_its_tokens_and_says_which_samples_were_pairs(tmp_path):
    policy = tiny(1)
    algorithm = made(policy=policy, reference=tiny(1))
    made_trainer = trainer(policy, algorithm, tmp_path, steps=2)
    assert made_trainer.train() == "steps"
    rows, samples = rows_of(tmp_path / "metrics.jsonl"), rows_of(tmp_path / "samples.jsonl")
    assert rows[-1]["num_tokens"] >= 2 * 12  # each completion has a token at least
    pairs = [sample["pair"] for sample in samples if "pair" in sample]
    assert len(pairs) == 2 * 8 and {"chosen", "rejected", None} == set(pairs)
    assert math.isfinite(rows[1]["loss"]) and rows[1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        ((), {"group_size": 1}, "group_size=1: a pair needs at least 2 samples of a prompt"),
        ((), {"reference": None}, "algo.loss=dpo compares the policy with a reference"),
        (("algo.beta=-1",), {}, "algo.beta=-1 must be above 0"),
        ((), {"world_size": 2}, "prompts_per_step=3 must be a multiple of the 2 processes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(overrides, given, message):
    with pytest.raises(ConfigError, match=message):
        made(*overrides, **given)


def test_plan_says_what_follows_from_the_settings():
    plan = dict(made().plan())
    assert plan["samples per step"] == "3 prompts x 4 = 12"
    assert plan["pairs per step"] == "at most 3"
    assert plan["rewards"] == "1 x r"


def test_a_loss_that_needs_no_reference_is_still_evaluated_against_one():
    """The KL that an evaluation measures is of interest whatever the loss is."""
    simpo = algorithm_node("simpo")["loss"]
    make = build._parts(algorithm_node("online_dpo") | {"loss": simpo})
    assert make.func.uses_reference(**make.keywords)
