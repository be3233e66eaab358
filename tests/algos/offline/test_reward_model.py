"""Reward models and classifiers against plain forwards of single rows; what they learn is a reward afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft.core.errors import CheckpointError, ConfigError, DataError
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from tests.algos.offline.builders import PAIRS, build_offline, gradient, labelled, loss_of, pairs, totals, widened
from tests.builders import TOKENIZER, perturbed, tiny, trainer

WITH_MARGIN = [(*pair, margin) for pair, margin in zip(PAIRS, (0.5, 0, 1, 2, 0.25, 0.1, 3), strict=True)]


def made(name: str, *overrides: str, **given):
    sizes = ("algo.pairs_per_step=5",) if name == "reward_model" else ("algo.rows_per_step=4",)
    data = given.pop("data", None) or (pairs() if name == "reward_model" else labelled())
    algorithm = build_offline(name, *sizes, *overrides, data=data, **given)
    return shaken(algorithm)


def shaken(algorithm):
    """The algorithm with a head that is not zero."""
    return perturbed(algorithm.head, seed=3, spread=0.3) and algorithm


def plain_outputs(algorithm, ids: list[int]) -> Tensor:
    """[K]: the head on the state of the last token, by one forward of the one row."""
    return algorithm.head.linear(algorithm.run.policy(torch.tensor([ids]))[0, -1])


def naive_losses(name: str, algorithm, examples) -> list[Tensor]:
    losses = []
    for example in examples:
        ids = example.prompt.ids
        if name == "reward_model":
            chosen, rejected = (plain_outputs(algorithm, ids + completion)[0] for completion in example.completions)
            margin = example.prompt.columns.get("margin") or 0.0
            losses.append(torch.log1p(torch.exp(-(chosen - rejected - margin))))
        else:
            logits = plain_outputs(algorithm, ids)
            losses.append(torch.log(torch.exp(logits).sum()) - logits[example.label])
    return losses


CASES = [("reward_model", None), ("reward_model", WITH_MARGIN), ("classification", None)]


def case(name: str, records):
    return made(name, data=pairs(records) if records else None)


@pytest.mark.parametrize(("name", "records"), CASES)
def test_loss_and_gradient_equal_a_naive_loop(name, records):
    algorithm = case(name, records)
    batch = algorithm.collect(1)
    examples = algorithm.run.data.batch(1, size=algorithm.per_step, seed=0)
    loss, expected = loss_of(algorithm, batch), sum(naive_losses(name, algorithm, examples)) / algorithm.per_step
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, wanted = gradient(loss, algorithm), gradient(expected, algorithm)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)
    assert wanted.norm() > 1e-2


@pytest.mark.parametrize(("name", "records"), CASES)
@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 3}, {"max_tokens": 20}])
def test_shares_of_micro_batches_add_up_to_the_whole_gradient(name, records, limits):
    algorithm = case(name, records)
    batch, whole, means = algorithm.collect(1), Metrics(), Metrics()
    expected = gradient(loss_of(algorithm, batch, whole), algorithm)
    micros, got = list(batch.micro_batches(**limits)), torch.zeros_like(expected)
    assert len(micros) > 1 and all(micro.num_rows % micro.rows_per_unit == 0 for micro in micros)
    scorer = Scorer(algorithm.run.policy, algorithm.head)
    for micro in micros:
        got += gradient(algorithm.loss(scorer, micro, totals(batch), means, update=0), algorithm)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert means.local() == pytest.approx(whole.local(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["reward_model", "classification"])
def test_padding_changes_nothing(name):
    algorithm = made(name)
    batch = algorithm.collect(1)
    torch.testing.assert_close(loss_of(algorithm, widened(batch)), loss_of(algorithm, batch), rtol=1e-12, atol=0)


def test_micro_batch_tokens_counts_the_whole_texts_although_one_place_of_each_counts():
    batch = made("reward_model").collect(0)
    for micro in batch.micro_batches(max_tokens=40):
        rows = micro.rows
        assert micro.num_rows == 2 or micro.num_rows * (rows.prompt_ids.shape[1] + rows.completion_ids.shape[1]) <= 40
    examples = made("reward_model").run.data.batch(0, size=5, seed=0)
    assert batch.num_tokens == sum(len(e.prompt.ids) + sum(map(len, e.completions)) for e in examples)


def test_a_text_that_fills_the_context_is_scored():
    policy = tiny(9, spread=0.25, n_positions=8).double()
    algorithm = made("reward_model", policy=policy, data=pairs([("d", "a", "bcdefg")]))  # 1 + 6 and its end
    examples = algorithm.run.data.batch(0, size=5, seed=0)
    loss, expected = (
        loss_of(algorithm, algorithm.collect(0)),
        sum(naive_losses("reward_model", algorithm, examples)) / 5,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_metrics_of_pairs():
    algorithm, means = made("reward_model"), Metrics()
    loss_of(algorithm, algorithm.collect(1), means)
    scores = [
        [float(plain_outputs(algorithm, example.prompt.ids + ids)[0].detach()) for ids in example.completions]
        for example in algorithm.run.data.batch(1, size=5, seed=0)
    ]
    expected = {
        "accuracy": sum(chosen > rejected for chosen, rejected in scores) / 5,
        "margin": sum(chosen - rejected for chosen, rejected in scores) / 5,
        "mean_reward": sum(map(sum, scores)) / 10,
    }
    assert means.local() == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["accuracy"] < 1


def test_untouched_head_knows_nothing():
    algorithm = build_offline("reward_model", data=pairs())
    metrics = algorithm.evaluate().metrics
    assert metrics["eval/accuracy"] == 0.5 and metrics["eval/mean_reward"] == 0.0
    assert metrics["eval/loss"] == pytest.approx(math.log(2), rel=1e-14)
    classifier = build_offline("classification", data=labelled())
    assert classifier.evaluate().metrics["eval/loss"] == pytest.approx(math.log(3), rel=1e-14)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_evaluation_is_the_mean_loss_over_held_out_rows(micro_batch):
    held_out = [("bb", "c", "dk"), ("k", "ab", "hijk"), ("cd", "jj", "a")]
    algorithm = made("reward_model", data=pairs(held_out=held_out), micro_batch=micro_batch)
    expected = sum(naive_losses("reward_model", algorithm, algorithm.run.data.examples("validation"))) / 3
    assert algorithm.evaluate().metrics["eval/loss"] == pytest.approx(float(expected.detach()), rel=1e-12)
    classifier = made("classification", data=labelled(held_out=[("aa", "y"), ("cba", "x")]), micro_batch=micro_batch)
    examples = classifier.run.data.examples("validation")
    expected = sum(naive_losses("classification", classifier, examples)) / 2
    best = [int(plain_outputs(classifier, example.prompt.ids).argmax()) for example in examples]
    metrics = classifier.evaluate().metrics
    assert metrics["eval/loss"] == pytest.approx(float(expected.detach()), rel=1e-12)
    assert metrics["eval/accuracy"] == sum(b == e.label for b, e in zip(best, examples, strict=True)) / 2


def test_margins_are_in_every_row_or_in_none():
    assert (
        "margin"
        not in made("reward_model", data=pairs([("a", "b", "c", None), ("b", "a", "c", None)])).collect(0).values
    )
    read = made("reward_model", data=pairs([("a", "b", "c", "0.5"), ("b", "a", "c", 0)])).collect(0)  # as CSV has it
    assert sorted(read.values["margin"].tolist()) in ([0] * n + [0.5] * (10 - n) for n in (4, 6))
    for margin in (None, "much", math.nan):
        with pytest.raises(DataError, match=r"memory:2: 'margin' is a number in every row or in none"):
            made("reward_model", data=pairs([("a", "b", "c", 1), ("b", "a", "c", margin)]))


@pytest.mark.parametrize(
    ("name", "overrides", "given", "message"),
    [
        ("classification", (), {"world_size": 3}, "rows_per_step=4 .* a multiple of the 3 processes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(name, overrides, given, message):
    with pytest.raises(ConfigError, match=message):
        made(name, *overrides, **given)


def test_plan_names_the_classes_and_what_guessing_gives():
    plan = dict(made("classification").plan())
    assert plan["classes"] == "x, y, z"
    assert plan["held-out accuracy of the commonest class"] == "0.400"


def test_checkpoint_of_other_classes_is_refused():
    state = made("classification").state_dict()
    made("classification").load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"classes are \['x', 'y', 'z'\], the data's \['p', 'q'\]"):
        made("classification", data=labelled([("a", "p"), ("b", "q")])).load_state_dict(state)


def test_early_stopping_takes_the_best_head_with_the_best_policy(tmp_path):
    policy = tiny(1)
    algorithm = build_offline("reward_model", policy=policy, data=pairs())
    values, heads = iter([3.0, 1.0, 2.0, 2.0, 0.5]), []
    measure = algorithm.evaluate

    def scripted():
        heads.append(algorithm.head.linear.weight.detach().clone())
        evaluation = measure()
        evaluation.metrics["eval/loss"] = next(values)
        return evaluation

    algorithm.evaluate = scripted
    made_trainer = trainer(policy, algorithm, tmp_path, steps=9, eval_every=1, patience=2)
    assert made_trainer.train() == "early_stopping"
    assert torch.equal(heads[-1], heads[1]) and not torch.equal(heads[1], heads[3])


def test_texts_end_with_the_end_token():
    examples = labelled().examples("train")
    assert all(example.prompt.ids[-1] == TOKENIZER.eos_id for example in examples)
