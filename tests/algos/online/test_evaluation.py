from __future__ import annotations

import math

import pytest
import torch

from rlft.algos.online.evaluation import distinct_n
from rlft.algos.online.scoring import frozen_scores
from rlft.core.batch import Batch
from rlft.core.errors import DataError, RewardError
from rlft.models.scorer import Scorer
from rlft.rollout.engine import generate
from tests.algos.micro import build, completions, eighths, frozen_distributions, loss_of
from tests.builders import ALPHABET, TOKENIZER, Float64Rewards, perturbed, reward_sum

PROMPTS = ("abc", "d", "efghi", "jk", "aa", "bdfhj", "c")


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["the film is the film"], 1, 3 / 5),
        (["the film is the film"], 2, 3 / 4),
        (["The film", "the FILM"], 2, 1 / 2),  # over all texts, lower-cased
        (["a b", "b a"], 2, 1.0),  # no n-gram across two texts
        (["a  b\nc", ""], 3, 1.0),
        (["one", ""], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == expected


def test_evaluation_is_the_same_twice_whatever_was_trained_between():
    algorithm = build("grpo", prompts=PROMPTS, eval_prompts=7)
    first = algorithm.evaluate()
    loss_of(algorithm, algorithm.collect(3), update=0)
    assert algorithm.evaluate() == first
    perturbed(algorithm.run.policy, seed=5, spread=0.3)
    assert algorithm.evaluate() != first


def test_evaluation_is_the_same_for_every_seed_and_batch_size(monkeypatch):
    first = build("grpo", prompts=PROMPTS, eval_prompts=7).evaluate()
    other = build("grpo", prompts=PROMPTS, eval_prompts=7, seed=99, micro_batch=2)
    monkeypatch.setattr("rlft.algos.online.evaluation.PROMPTS_AT_ONCE", 3)
    again = other.evaluate()
    assert again.samples == first.samples
    assert again.metrics == pytest.approx(first.metrics, rel=1e-12)


def test_evaluation_measures_what_a_naive_loop_measures():
    algorithm = build("grpo", prompts=PROMPTS, eval_prompts=6)
    evaluation = algorithm.evaluate()
    rollout = generate(
        algorithm.run.policy, [TOKENIZER.encode(text) for text in PROMPTS[:6]], group_size=1,
        sampling=algorithm.run.sampling, seed=0, stream="eval", eos_id=TOKENIZER.eos_id,
    )  # fmt: skip
    batch = Batch(rollout.rows)
    ids = completions(batch)
    kls, nll, rewards = [], [], eighths(ids)
    for row, tokens in enumerate(ids):
        logp, _ = frozen_distributions(algorithm.run.policy, batch, row, 0.8)
        logq, _ = frozen_distributions(algorithm.run.reference, batch, row, 0.8)
        kls.append([float((logp[t].exp() * (logp[t] - logq[t])).sum()) for t in range(len(tokens))])
        plain, _ = frozen_distributions(algorithm.run.reference, batch, row, 1.0)  # perplexity is at temperature 1
        nll += [-float(plain[t, a]) for t, a in enumerate(tokens)]
    expected = {
        "eval/reward": sum(rewards) / 6,
        "eval/reward_std": math.sqrt(sum((r - sum(rewards) / 6) ** 2 for r in rewards) / 6),
        "eval/rewards/r/mean": sum(rewards) / 6,
        "eval/completions/mean_length": len(nll) / 6,
        "eval/kl": sum(map(sum, kls)) / len(nll),
        "eval/kl_completion": sum(map(sum, kls)) / 6,
        "eval/reference_perplexity": math.exp(sum(nll) / len(nll)),
        "eval/distinct_1": 1.0,  # a completion is one word here, and no two are the same
        "eval/distinct_2": 0.0,
    }
    assert evaluation.metrics == pytest.approx(expected, rel=1e-10)
    assert [sample["prompt"] for sample in evaluation.samples] == list(PROMPTS[:6])
    assert [sample["reward"] for sample in evaluation.samples] == rewards
    texts = ["".join(ALPHABET[i] for i in tokens if i < 11) for tokens in ids]
    assert [sample["completion"] for sample in evaluation.samples] == texts


def test_evaluation_without_a_reference_measures_no_kl():
    metrics = build("dr_grpo", reference=None).evaluate().metrics
    assert not [name for name in metrics if "kl" in name or "reference" in name]


def test_evaluation_leaves_out_what_no_reward_counts():
    def some(completion_ids, **_):
        return [None if i == 1 else 1.0 + i for i in range(len(completion_ids))]

    algorithm = build("grpo", rewards=reward_sum(some, cls=Float64Rewards))
    assert algorithm.evaluate().metrics["eval/reward"] == pytest.approx((1 + 3 + 4) / 3, rel=1e-12)


def test_no_held_out_prompt_is_an_error_that_says_so():
    algorithm = build("grpo")
    algorithm.run.data._prompts.clear()
    with pytest.raises(DataError, match="validation split has no prompt"):
        algorithm.evaluate()


def test_an_evaluation_that_no_reward_counts_is_an_error():
    algorithm = build("grpo", rewards=reward_sum(lambda completions, **_: [None] * len(completions)))
    with pytest.raises(RewardError, match="no reward counts any"):
        algorithm.evaluate()


def test_higher_reward_is_better():
    assert build("grpo").objective == ("eval/reward", "max")


@pytest.mark.parametrize("limits", [(None, None), (1, None), (4, None), (None, 20)])
def test_frozen_scores_are_the_scorers_whatever_the_micro_batches(limits):
    algorithm = build("grpo")
    batch, policy = algorithm.collect(1), algorithm.run.policy.train()
    logprobs, hidden, values = frozen_scores(policy, batch, temperature=0.8, max_rows=limits[0], max_tokens=limits[1])
    scores = Scorer(policy)(batch.rows, temperature=0.8)
    mask = batch.rows.completion_mask
    torch.testing.assert_close(logprobs, scores.logprobs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hidden[mask], scores.hidden, rtol=1e-10, atol=1e-13)
    assert not hidden[~mask].any()
    assert not logprobs.requires_grad and values is None
    assert policy.training


# Collecting: what is sampled, and with whose logprobs.


def test_collect_follows_from_weights_seed_and_step_alone():
    algorithm = build("grpo")
    first = algorithm.collect(1)
    algorithm.collect(2)
    torch.rand(7)
    again = algorithm.collect(1)
    assert completions(again) == completions(first)
    assert all(torch.equal(first.values[name], again.values[name]) for name in first.values)
    assert completions(algorithm.collect(2)) != completions(first)
    one = {"prompts": ("abc",), "prompts_per_step": 1}  # the order of the prompts cannot differ
    assert completions(build("grpo", seed=1, **one).collect(1)) != completions(build("grpo", **one).collect(1))


def test_ranks_collect_what_one_process_would():
    whole, parts, advantages = build("grpo").collect(1), [], []
    for rank in range(2):
        part = build("grpo", rank=rank, world_size=2).collect(1)
        parts += completions(part)
        advantages += part.values["advantages"][:, 0].tolist()
    assert parts == completions(whole)
    assert advantages == pytest.approx(whole.values["advantages"][:, 0].tolist(), rel=1e-12)


def test_bent_sampling_keeps_the_policys_own_logprobs_as_the_denominator():
    algorithm = build("grpo", "algo.top_k=2", "algo.allow_bent_sampling=true")
    batch = algorithm.collect(1)
    for row, ids in enumerate(completions(batch)):
        logp, _ = frozen_distributions(algorithm.run.policy, batch, row, 0.8)
        assert all(a in logp[t].topk(2).indices.tolist() for t, a in enumerate(ids))
        own = [float(logp[t, a]) for t, a in enumerate(ids)]
        assert batch.values["old_logprobs"][row][: len(ids)].tolist() == pytest.approx(own, rel=1e-10)
    loss_of(algorithm, batch, update=0)  # and so the sampler's check passes


def test_rewards_see_prompts_texts_ids_and_columns():
    seen = {}

    def spy(prompts, completions, completion_ids, number, **_):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, number=number)
        return [0.0] * len(prompts)

    algorithm = build("grpo", rewards=reward_sum(spy), prompts=("abc", "d"))
    batch = algorithm.collect(0)
    prompts = [p.text for p in algorithm.run.data.batch(0, size=2, seed=0)]
    assert seen["prompts"] == [text for text in prompts for _ in range(3)]
    assert seen["number"] == [("abc", "d").index(text) for text in seen["prompts"]]
    assert seen["ids"] == completions(batch)
    assert seen["completions"] == [TOKENIZER.decode(ids) for ids in seen["ids"]]


def test_samples_carry_reward_and_advantage_of_their_row():
    batch = build("grpo", "algo.samples_per_step=4").collect(1)
    assert [sample["reward"] for sample in batch.samples] == eighths(completions(batch))[:4]
    assert [sample["advantage"] for sample in batch.samples] == batch.values["advantages"][:4, 0].tolist()
