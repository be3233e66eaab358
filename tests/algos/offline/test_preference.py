"""DPO, IPO, SimPO and ORPO against loops over plain forwards of single rows, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft import build
from rlft.algos.pairs import PairLoss, check_pair_loss
from rlft.core.errors import ConfigError, DataError
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from tests.algos.offline.builders import PAIRS, build_offline, gradient, loss_of, pairs, reference, totals, widened
from tests.builders import TOKENIZER, algorithm_node, tiny
from tests.models.tiny import plain_logprobs

NAMES = ["dpo", "ipo", "simpo", "orpo"]
BETA = {"dpo": 0.3, "ipo": 0.2, "simpo": 2.0, "orpo": 0.7}  # large enough to bend the losses
WITH_REFERENCE = ("dpo", "ipo")


def made(name: str, *overrides: str, **given):
    sizes = (f"algo.beta={BETA[name]}", "algo.pairs_per_step=5")
    defaults = {"reference": reference() if name in WITH_REFERENCE else None, "data": pairs()}
    return build_offline(name, *sizes, *overrides, **(defaults | given))


def plain(policy, example) -> tuple[Tensor, Tensor, int, int]:
    """Summed logprobs of chosen and rejected with their end token, and their lengths."""
    ids = example.prompt.ids
    sums = [plain_logprobs(policy, ids, completion).sum() for completion in example.completions]
    return sums[0], sums[1], len(example.completions[0]), len(example.completions[1])


def naive_losses(name: str, algorithm, examples) -> list[Tensor]:
    """Each pair's loss, written out; nothing of it comes from rlft.functional."""
    beta, losses = BETA[name], []
    for example in examples:
        chosen, rejected, num_chosen, num_rejected = plain(algorithm.run.policy, example)
        if name in WITH_REFERENCE:
            with torch.no_grad():
                ref_chosen, ref_rejected, *_ = plain(algorithm.run.reference, example)
            h = (chosen - ref_chosen) - (rejected - ref_rejected)
            losses.append(torch.log1p(torch.exp(-beta * h)) if name == "dpo" else (h - 1 / (2 * beta)) ** 2)
        elif name == "simpo":
            losses.append(torch.log1p(torch.exp(1.0 - beta * (chosen / num_chosen - rejected / num_rejected))))
        else:
            p, q = torch.exp(chosen / num_chosen), torch.exp(rejected / num_rejected)
            ratio = (p / (1 - p)) / (q / (1 - q))
            losses.append(-chosen / num_chosen + beta * torch.log(1 + 1 / ratio))
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_equal_a_naive_loop(name):
    algorithm = made(name)
    examples, batch = algorithm.run.data.batch(1, size=5, seed=0), algorithm.collect(1)
    assert len({len(ids) for example in examples for ids in example.completions}) > 2  # padding is there
    loss = loss_of(algorithm, batch)
    expected = sum(naive_losses(name, algorithm, examples)) / 5
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, wanted = gradient(loss, algorithm), gradient(expected, algorithm)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert wanted.norm() > 1e-2


def test_completions_end_with_the_counted_end_token():
    batch = made("dpo").collect(0)
    for ids, mask in zip(batch.rows.completion_ids, batch.rows.completion_mask, strict=True):
        assert ids[mask].tolist()[-1] == TOKENIZER.eos_id


def test_rows_of_a_pair_stand_together_and_share_their_prompt():
    algorithm = made("dpo")
    batch, examples = algorithm.collect(0), algorithm.run.data.batch(0, size=5, seed=0)
    assert batch.rows.prompt_of_row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(batch.rows.prompt_ids) == 5
    ids = [row[mask].tolist() for row, mask in zip(batch.rows.completion_ids, batch.rows.completion_mask, strict=True)]
    assert ids == [completion for example in examples for completion in example.completions]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 3}, {"max_rows": 4}, {"max_tokens": 33}])
def test_shares_of_micro_batches_add_up_to_the_whole_gradient(name, limits):
    algorithm = made(name)
    batch, whole, means = algorithm.collect(1), Metrics(), Metrics()
    expected = gradient(loss_of(algorithm, batch, whole), algorithm)
    micros, got = list(batch.micro_batches(**limits)), torch.zeros_like(expected)
    assert len(micros) > 1 and all(micro.num_rows % 2 == 0 for micro in micros)
    for micro in micros:
        share = algorithm.loss(Scorer(algorithm.run.policy), micro, totals(batch), means, update=0)
        got += gradient(share, algorithm)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert means.local() == pytest.approx(whole.local(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    algorithm = made(name)
    batch = algorithm.collect(1)
    got, wanted = loss_of(algorithm, widened(batch)), loss_of(algorithm, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(got, algorithm), gradient(wanted, algorithm), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("limits", [{"micro_batch": 1}, {"micro_batch": 4}, {"micro_batch_tokens": 20}])
def test_reference_is_scored_the_same_in_pieces(limits):
    whole, cut = made("dpo").collect(1), made("dpo", **limits).collect(1)
    torch.testing.assert_close(cut.values["ref_logprobs"], whole.values["ref_logprobs"], rtol=1e-13, atol=0)


def test_gradient_of_dpo_at_the_initial_policy_is_half_beta_times_the_difference_of_scores():
    policy = tiny(9, spread=0.25).double()
    algorithm = made("dpo", policy=policy, reference=policy)
    loss = loss_of(algorithm, algorithm.collect(1))
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-14)
    difference = torch.zeros((), dtype=torch.float64)
    for example in algorithm.run.data.batch(1, size=5, seed=0):
        chosen, rejected, *_ = plain(policy, example)
        difference = difference + (chosen - rejected) / 5
    wanted = -BETA["dpo"] / 2 * gradient(difference, algorithm)
    torch.testing.assert_close(gradient(loss, algorithm), wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_trls(name):
    algorithm, means = made(name), Metrics()
    loss_of(algorithm, algorithm.collect(2), means)
    rewards: list[list[float]] = [[], []]
    sums: list[list[float]] = [[], []]
    for example in algorithm.run.data.batch(2, size=5, seed=0):
        *both, num_chosen, num_rejected = plain(algorithm.run.policy, example)
        refs = plain(algorithm.run.reference, example)[:2] if name in WITH_REFERENCE else (0.0, 0.0)
        for i, length in enumerate((num_chosen, num_rejected)):
            score = float((both[i] - refs[i]).detach())
            rewards[i].append(BETA[name] * (score if name in WITH_REFERENCE else score / length))
            sums[i].append(float(both[i].detach()))
    margins = [chosen - rejected for chosen, rejected in zip(*rewards, strict=True)]
    expected = {
        "rewards/chosen": sum(rewards[0]) / 5, "rewards/rejected": sum(rewards[1]) / 5,
        "rewards/accuracies": sum(m > 0 for m in margins) / 5, "rewards/margins": sum(margins) / 5,
        "logps/chosen": sum(sums[0]) / 5, "logps/rejected": sum(sums[1]) / 5,
    }  # fmt: skip
    row = means.local()
    assert 0 < row["rewards/accuracies"] < 1
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-11)
    assert row.keys() - expected.keys() == {"entropy"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_evaluation_is_the_mean_loss_over_held_out_pairs(name, micro_batch):
    held_out = [("bb", "c", "dk"), ("k", "ab", "hijk"), ("cd", "jj", "a")]
    algorithm = made(name, data=pairs(held_out=held_out), micro_batch=micro_batch)
    examples = algorithm.run.data.examples("validation")
    assert [example.prompt.text for example in examples] == ["bb", "k", "cd"]
    metrics = algorithm.evaluate().metrics
    expected = float(sum(naive_losses(name, algorithm, examples)).detach()) / 3
    assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-12)
    assert {"eval/rewards/accuracies", "eval/rewards/margins"} <= metrics.keys()
    first = build_offline(
        name, f"algo.beta={BETA[name]}", "algo.eval_pairs=1", data=algorithm.run.data, policy=algorithm.run.policy,
        reference=algorithm.run.reference,
    )  # fmt: skip
    loss = float(naive_losses(name, algorithm, examples)[0].detach())
    assert first.evaluate().metrics["eval/loss"] == pytest.approx(loss, rel=1e-12)


def test_untouched_policy_has_even_accuracies_and_no_margin():
    policy = tiny(9, spread=0.25).double()
    metrics = made("dpo", policy=policy, reference=policy).evaluate().metrics
    assert metrics["eval/rewards/accuracies"] == 0.5
    assert metrics["eval/rewards/margins"] == 0.0
    assert metrics["eval/loss"] == pytest.approx(math.log(2), rel=1e-14)


def test_evaluation_is_the_same_twice_and_shows_samples_behind_held_out_prompts():
    algorithm = made("dpo")
    first, second = algorithm.evaluate(), algorithm.evaluate()
    assert first == second
    assert [sample["prompt"] for sample in first.samples] == [prompt for prompt, *_ in PAIRS[:5]]


def test_a_loss_without_a_reference_does_not_ask_one_that_is_there(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the reference was asked")

    given = reference()
    monkeypatch.setattr(given, "forward", asked)
    algorithm = made("simpo", reference=given)
    assert "ref_logprobs" not in algorithm.collect(0).values
    assert algorithm.evaluate().metrics == made("simpo").evaluate().metrics
    loss, expected = loss_of(algorithm, algorithm.collect(0)), loss_of(made("simpo"), made("simpo").collect(0))
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "asks"), [("dpo", True), ("ipo", True), ("simpo", False), ("orpo", False)])
def test_a_copy_of_the_policy_is_made_as_reference_only_for_a_loss_that_asks_it(name, asks):
    make = build._parts(algorithm_node(name))
    assert make.func.uses_reference(**make.keywords) is asks


def test_ranks_share_the_pairs_of_a_step():
    sizes = ("algo.pairs_per_step=4",)
    whole = made("dpo", *sizes).collect(1)
    parts = [made("dpo", *sizes, rank=rank, world_size=2).collect(1) for rank in range(2)]
    texts = [sorted(map(tuple, part.rows.completion_ids.tolist())) for part in (whole, *parts)]
    width = whole.rows.completion_ids.shape[1]
    padded = [[(*row, *([0] * (width - len(row)))) for row in part] for part in texts[1:]]
    assert sorted(padded[0] + padded[1]) == texts[0]


@pytest.mark.parametrize(
    ("name", "overrides", "given", "message"),
    [
        ("dpo", (), {"reference": None}, "algo.loss=dpo compares the policy with a reference: set reference=initial"),
        ("ipo", (), {"reference": None}, "algo.loss=ipo compares"),
        ("dpo", ("algo.beta=0",), {}, "algo.beta=0 must be above 0"),
        ("dpo", ("algo.loss.label_smoothing=0.5",), {}, r"algo\.loss: label_smoothing must be in \[0, 0\.5\)"),
        ("simpo", ("algo.loss.gamma=-1",), {}, r"algo\.loss: gamma must be at least 0"),
        ("dpo", ("+algo.loss.beta=0.1",), {}, "algo.loss.beta is set by algo.beta"),
        ("ipo", ("algo.loss._target_=rlft.functional.preference.kto",), {},
         "algo.loss: kto asks for the tensor 'logprobs'"),
        ("dpo", (), {"world_size": 2}, "pairs_per_step=5 must be a multiple of the 2 processes"),
        ("dpo", (), {"policy": tiny(n_positions=9)}, r"memory:3: 10 tokens do not fit .* data\.max_tokens=9"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_reason(name, overrides, given, message):
    with pytest.raises(ConfigError, match=message):
        made(name, *overrides, **given)


@pytest.mark.parametrize(
    "function",
    [lambda chosen, rejected: chosen, lambda chosen, *, beta: chosen, lambda rejected, ref_chosen, *, beta: rejected],
)
def test_what_takes_no_pair_or_no_beta_is_no_loss_on_pairs(function):
    with pytest.raises(ConfigError, match=r"^algo\.loss=<lambda> is no loss on pairs: it must take chosen, rejected"):
        check_pair_loss(function, beta=0.1, has_reference=True)


def test_a_loss_may_name_lengths_and_ask_for_no_reference():
    def per_token(chosen, rejected, chosen_lengths, rejected_lengths, *, beta):
        return beta * (chosen / chosen_lengths - rejected / rejected_lengths)

    check_pair_loss(per_token, beta=0.5, has_reference=False)
    loss, metrics = PairLoss(per_token, beta=0.5), Metrics()
    assert not loss.needs_reference
    got = loss(torch.tensor([-6.0, -8.0, -3.0, -1.0]), torch.tensor([3, 2, 1, 1]), None, metrics)
    assert got.tolist() == [1.0, -1.0]
    assert metrics.local()["rewards/margins"] == 0.0 and metrics.local()["logps/chosen"] == -4.5


def test_long_pairs_are_left_out_where_asked_for():
    data = pairs(max_tokens=8, on_unusable="skip")
    made("dpo", policy=tiny(n_positions=8), data=data, reference=reference())
    assert (data.counts["train_examples"], data.counts["too_long"]) == (6, 2)  # both splits are the same here


def test_a_data_set_without_a_held_out_pair_is_refused():
    with pytest.raises(DataError, match="validation split has no example"):
        made("dpo", data=pairs(held_out=[])).evaluate()


def test_plan_says_what_follows_from_the_settings():
    plan = dict(made("dpo").plan())
    assert plan["examples per step"] == "5"
    assert plan["data: train_examples"] == plan["held-out examples"] == "7"


def test_lower_loss_is_better():
    assert made("dpo").objective == ("eval/loss", "min")
