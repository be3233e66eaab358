"""KTO against a loop over plain forwards of single rows, in float64; z0 over the whole batch, however it is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft.core.errors import ConfigError, DataError
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from tests.algos.offline.builders import JUDGED, build_offline, gradient, judged, loss_of, reference, totals, widened
from tests.builders import perturbed, tiny
from tests.models.tiny import plain_logprobs

WEIGHTS = ("algo.desirable_weight=1.2", "algo.undesirable_weight=0.7")


def made(*overrides: str, **given):
    defaults = {"reference": reference(), "data": judged()}
    return build_offline("kto", "algo.beta=0.3", "algo.rows_per_step=4", *WEIGHTS, *overrides, **(defaults | given))


def log_ratio(algorithm, prompt: list[int], completion: list[int]) -> Tensor:
    with torch.no_grad():
        ref = plain_logprobs(algorithm.run.reference, prompt, completion).sum()
    return plain_logprobs(algorithm.run.policy, prompt, completion).sum() - ref


@torch.no_grad()
def naive_z0(algorithm, examples, *, room: int = 99) -> float:
    """Each prompt with the completion of the example before, the first with the last's."""
    total = 0.0
    for i, example in enumerate(examples):
        ids = examples[i - 1].completions[0][: room - len(example.prompt.ids)]
        total += float(log_ratio(algorithm, example.prompt.ids, ids))
    return max(0.0, total / len(examples))


def naive_loss(algorithm, examples, z0: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        gain = 0.3 * (log_ratio(algorithm, example.prompt.ids, example.completions[0]) - z0)
        weight, sign = (1.2, 1) if example.label else (0.7, -1)
        total = total + weight * (1 - 1 / (1 + torch.exp(-sign * gain)))
    return total / len(examples)


def drawn(algorithm, index: int):
    return algorithm.run.data.batch(index, size=4, seed=0)


def swapped(algorithm):
    """The algorithm with policy and reference exchanged, whose z0 has the other sign."""
    return made(policy=algorithm.run.reference, reference=algorithm.run.policy)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("exchanged", [False, True])
def test_loss_and_gradient_equal_a_naive_loop(index, exchanged):
    algorithm = swapped(made()) if exchanged else made()
    examples, batch, means = drawn(algorithm, index), algorithm.collect(index), Metrics()
    z0 = naive_z0(algorithm, examples)
    assert batch.metrics.local()["kl"] == pytest.approx(z0, rel=1e-12)
    loss, expected = loss_of(algorithm, batch, means), naive_loss(algorithm, examples, z0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, wanted = gradient(loss, algorithm), gradient(expected, algorithm)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)
    assert wanted.norm() > 1e-3


def test_z0_is_above_zero_for_one_of_the_two_and_never_below():
    values = [algorithm.collect(0).metrics.local()["kl"] for algorithm in (made(), swapped(made()))]
    assert min(values) == 0.0 and max(values) > 0.1


def test_z0_is_zero_and_the_loss_half_the_mean_weight_for_the_untouched_policy():
    policy = tiny(9, spread=0.25).double()
    algorithm = made(policy=policy, reference=policy)
    batch = algorithm.collect(0)
    weights = [1.2 if example.label else 0.7 for example in drawn(algorithm, 0)]
    assert batch.values["z0"].tolist() == [0.0] * 4
    assert float(loss_of(algorithm, batch).detach()) == pytest.approx(sum(weights) / 8, rel=1e-14)


def test_a_mismatched_completion_is_cut_at_the_end_of_the_context():
    records = [("abcdef", "k", 1), ("b", "cdefgh", 0), ("cde", "ji", 1), ("hg", "fb", 0)]  # 6 + 7 do not fit in 9
    policy, other = (tiny(seed, spread=0.25, n_positions=9).double() for seed in (9, 2))
    for own, ref in ((policy, other), (other, policy)):
        algorithm = made(policy=own, reference=ref, data=judged(records))
        for index in range(3):
            expected = naive_z0(algorithm, drawn(algorithm, index), room=9)
            assert algorithm.collect(index).metrics.local()["kl"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 3}, {"max_tokens": 17}])
def test_shares_of_micro_batches_add_up_to_the_whole_gradient(limits):
    algorithm = swapped(made())
    batch, whole, means = algorithm.collect(1), Metrics(), Metrics()
    assert batch.values["z0"][0] > 0
    expected = gradient(loss_of(algorithm, batch, whole), algorithm)
    micros, got = list(batch.micro_batches(**limits)), torch.zeros_like(expected)
    assert len(micros) > 1
    for micro in micros:
        share = algorithm.loss(Scorer(algorithm.run.policy), micro, totals(batch), means, update=0)
        got += gradient(share, algorithm)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert means.local() == pytest.approx(whole.local(), rel=1e-12, abs=1e-12)


def test_padding_changes_nothing():
    algorithm = made()
    batch = algorithm.collect(1)
    torch.testing.assert_close(loss_of(algorithm, widened(batch)), loss_of(algorithm, batch), rtol=1e-12, atol=0)


def test_z0_is_of_the_policy_that_begins_the_step_with_no_gradient():
    algorithm = swapped(made())
    batch = algorithm.collect(1)
    before = float(batch.values["z0"][0])
    perturbed(algorithm.run.policy, seed=4, spread=0.1)
    expected = naive_loss(algorithm, drawn(algorithm, 1), before)
    torch.testing.assert_close(loss_of(algorithm, batch), expected, rtol=1e-12, atol=0)


def test_metrics_are_means_over_each_kind():
    algorithm, means = made(), Metrics()
    examples = drawn(algorithm, 0)
    loss_of(algorithm, algorithm.collect(0), means)
    row, kinds = means.local(), {1: "chosen", 0: "rejected"}
    assert {example.label for example in examples} == {0, 1}
    for label, name in kinds.items():
        ratios = [
            float(log_ratio(algorithm, e.prompt.ids, e.completions[0]).detach()) for e in examples if e.label == label
        ]
        assert row[f"rewards/{name}"] == pytest.approx(0.3 * sum(ratios) / len(ratios), rel=1e-12)


def test_evaluation_takes_z0_over_all_held_out_completions():
    for algorithm in (made(micro_batch=2), swapped(made())):
        examples = algorithm.run.data.examples("validation")
        expected = float(naive_loss(algorithm, examples, naive_z0(algorithm, examples)).detach())
        metrics = algorithm.evaluate().metrics
        assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-12)
        margin = metrics["eval/rewards/chosen"] - metrics["eval/rewards/rejected"]
        assert metrics["eval/rewards/margins"] == margin


def test_a_batch_of_one_kind_has_no_metrics_of_the_other():
    algorithm, means = made(data=judged([record for record in JUDGED if record[2] == 1])), Metrics()
    loss = loss_of(algorithm, algorithm.collect(0), means)
    assert math.isfinite(float(loss.detach())) and "rewards/rejected" not in means.local()
    assert "eval/rewards/margins" not in algorithm.evaluate().metrics


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        ((), {"reference": None}, "algo=kto compares the policy with a reference: set reference=initial"),
        ((), {"world_size": 2}, "z0 over the whole batch, and so far does so in one process only"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(overrides, given, message):
    with pytest.raises(ConfigError, match=message):
        made(*overrides, **given)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_one_completion_whose_loss_says_nothing_is_refused(split):
    one, two = JUDGED[:1], JUDGED[:2]
    made(data=judged(two, two))
    with pytest.raises(DataError, match=rf"the {split} split has 1 completion, memory:1: .* at least 2: give more"):
        made(data=judged(one, two) if split == "train" else judged(two, one))
