from __future__ import annotations

import json
import math

import pytest
import torch

from rlft.algos.online.kl import Adaptive, Annealed, Fixed, KLPenalty
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.functional.shapes import PerCompletion
from rlft.references.frozen import initial
from tests.algos.micro import build, completions, eighths, frozen_distributions, gradient, loss_of
from tests.builders import perturbed, tiny

LOGPROBS = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-1.5, -0.5]], dtype=torch.float64)  # d = 0.5, -1.5


@pytest.mark.parametrize(
    ("estimator", "values"),
    [
        ("k1", [0.5, -1.5]),
        ("k2", [0.125, 1.125]),
        ("k3", [0.1065306597126334, 1.9816890703380645]),  # exp(-0.5) - 0.5, exp(1.5) - 2.5
    ],
)
def test_penalty_is_its_estimator_whatever_its_coefficient(estimator, values):
    penalty = KLPenalty(estimator, coef=0.0, where="loss")(LOGPROBS, REFERENCE)
    assert penalty.tolist() == [pytest.approx(values, rel=1e-14)]


@pytest.mark.parametrize("coef", [0.1, 0.0])
@pytest.mark.parametrize("where", ["loss", "reward"])
def test_penalty_is_trained_in_one_place_or_none(coef, where):
    penalty = KLPenalty("k3", coef=coef, where=where)
    assert penalty.is_in_loss == (coef > 0 and where == "loss")
    assert penalty.is_in_reward == (coef > 0 and where == "reward")


def test_k1_in_the_loss_is_refused_because_it_holds_nothing():
    with pytest.raises(ConfigError, match="the expected gradient of k1 is zero"):
        KLPenalty("k1", coef=0.04, where="loss")


def test_k1_in_the_loss_may_be_measured():
    KLPenalty("k1", coef=0.0, where="loss")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("k4", 0.1, "loss"), r"algo\.kl\.estimator=k4 is not one of k1, k2, k3"),
        (("k3", 0.1, "advantage"), r"algo\.kl\.where=advantage is not one of loss, reward"),
        (("k3", -0.1, "loss"), r"algo\.kl\.coef must be at least 0, got -0\.1"),
    ],
)
def test_wrong_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        KLPenalty(*arguments)


# In the composition: what is logged, what is trained, and where.


def naive_kl(algorithm, batch) -> tuple[list[float], list[float]]:
    """The log ratio of every counted token, and the exact KL at its place, summed over the vocabulary."""
    ratios, exact = [], []
    for row in range(batch.num_rows):
        logp, ids = frozen_distributions(algorithm.run.policy, batch, row, algorithm.run.sampling.temperature)
        logq, _ = frozen_distributions(algorithm.run.reference, batch, row, algorithm.run.sampling.temperature)
        ratios += [float(logp[t, a] - logq[t, a]) for t, a in enumerate(ids)]
        exact += [sum(float(logp[t, v].exp() * (logp[t, v] - logq[t, v])) for v in range(12)) for t in range(len(ids))]
    return ratios, exact


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("choice", "formula"),
    [("in_reward", lambda d: d), ("k2", lambda d: d * d / 2), ("k3", lambda d: math.exp(-d) - 1 + d)],
)
@torch.no_grad()
def test_logged_kl_is_the_estimator_and_kl_exact_the_sum_over_the_vocabulary(choice, formula):
    algorithm = build("dr_grpo", f"algo/kl={choice}", "algo.kl.coef=0.5")
    batch = algorithm.collect(1)
    perturbed(algorithm.run.policy, seed=5, spread=0.05)
    means = Metrics()
    for micro in batch.micro_batches(max_rows=4):
        loss_of(algorithm, micro, update=1, metrics=means)
    ratios, exact = naive_kl(algorithm, batch)
    assert means.local()["kl"] == pytest.approx(mean([formula(d) for d in ratios]), rel=1e-11)
    assert means.local()["kl_exact"] == pytest.approx(mean(exact), rel=1e-11)


@pytest.mark.parametrize("choice", ["k2", "k3"])
def test_the_kl_in_the_loss_is_the_one_that_is_logged(choice):
    algorithm = build("grpo", f"algo/kl={choice}", "algo/aggregation=token_mean")
    free = build("grpo", "algo.kl.coef=0", "algo/aggregation=token_mean", policy=algorithm.run.policy)
    batch, means = algorithm.collect(1), Metrics()
    penalised, plain = loss_of(algorithm, batch, update=0, metrics=means), loss_of(free, batch, update=0)
    assert float((penalised - plain).detach()) == pytest.approx(0.5 * means.local()["kl"], rel=1e-10)


def test_the_kl_in_the_reward_is_the_one_that_is_logged():
    seen = {}

    def advantage(rewards: PerCompletion) -> PerCompletion:
        seen["rewards"] = rewards
        return torch.zeros_like(rewards)

    algorithm = build("rloo", parts={"advantage": advantage})
    batch, means = algorithm.collect(1), Metrics()
    loss_of(algorithm, batch, update=0, metrics=means)
    ratios, _ = naive_kl(algorithm, batch)
    expected = []
    for ids, reward in zip(completions(batch), eighths(completions(batch)), strict=True):
        expected.append(reward - 0.5 * sum(ratios[: len(ids)]))
        del ratios[: len(ids)]
    assert seen["rewards"].tolist() == pytest.approx(expected, rel=1e-11)
    lost = sum(eighths(completions(batch))) - sum(expected)
    assert lost == pytest.approx(0.5 * means.local()["kl"] * batch.num_tokens, rel=1e-11)


def test_reward_that_is_logged_is_before_the_penalty():
    batch = build("rloo").collect(1)
    assert batch.metrics.local()["reward"] == pytest.approx(mean(eighths(completions(batch))), rel=1e-12)


def test_without_a_penalty_the_reference_only_measures():
    measured = build("dr_grpo")
    free = build("dr_grpo", policy=measured.run.policy, reference=None)
    batch, with_reference, without = measured.collect(1), Metrics(), Metrics()
    a = gradient(loss_of(measured, batch, update=0, metrics=with_reference), measured.run.policy)
    b = gradient(loss_of(free, free.collect(1), update=0, metrics=without), measured.run.policy)
    assert torch.equal(a, b)
    assert with_reference.local().keys() - without.local().keys() == {"kl", "kl_exact"}
    assert with_reference.local()["kl"] > 0


def test_kl_to_the_initial_policy_is_zero_at_first_and_its_copy_is_frozen():
    policy = tiny(9, spread=0.25).double()
    reference = initial(policy)
    algorithm, means = build("grpo", policy=policy, reference=reference), Metrics()
    batch = algorithm.collect(1)
    loss_of(algorithm, batch, update=0, metrics=means)
    assert means.local()["kl"] == pytest.approx(0.0, abs=1e-14)
    assert means.local()["kl_exact"] == pytest.approx(0.0, abs=1e-14)
    before = {name: p.clone() for name, p in reference.state_dict().items()}
    perturbed(policy, seed=5, spread=0.1)
    assert all(torch.equal(before[name], p) for name, p in reference.state_dict().items())
    assert not any(p.requires_grad for p in reference.parameters())


def test_exact_kl_is_left_out_where_the_vocabulary_is_large(monkeypatch):
    monkeypatch.setattr("rlft.algos.online.scoring.EXACT_KL_VOCABULARY", 11)
    algorithm, means = build("grpo"), Metrics()
    batch = algorithm.collect(1)
    loss_of(algorithm, batch, update=0, metrics=means)
    assert "kl" in means.local()
    assert "kl_exact" not in means.local()
    assert "ref_hidden" not in batch.values


# Controllers.


def test_adaptive_controller_is_zieglers_formula():
    penalty = KLPenalty("k1", coef=0.1, where="reward", controller=Adaptive(target=6.0, horizon=100.0))
    expected = 0.1
    for kl, count in ((6.6, 20), (60.0, 20), (0.0, 10)):  # errors 0.1, clipped to 0.2, clipped to -0.2
        penalty.controller.observe(kl_completion=kl, num_tokens=1, num_completions=count)
        expected *= 1 + min(max(kl / 6 - 1, -0.2), 0.2) * count / 100
        assert penalty.coef == pytest.approx(expected, rel=1e-14)


def test_annealed_controller_rises_to_the_coefficient_over_its_tokens():
    penalty, seen = KLPenalty("k3", coef=0.4, where="loss", controller=Annealed(tokens=100)), []
    for _ in range(4):
        seen.append(penalty.coef)
        penalty.controller.observe(kl_completion=1.0, num_tokens=40, num_completions=1)
    assert seen == pytest.approx([0.0, 0.16, 0.32, 0.4], rel=1e-14)
    assert penalty.is_in_loss  # from the first batch on, although its coefficient is 0 there


@pytest.mark.parametrize("make", [lambda: Adaptive(target=1.0, horizon=50.0), lambda: Annealed(tokens=70), Fixed])
def test_a_resumed_controller_goes_on_where_it_was(make):
    def run(penalty, batches):
        coefs = []
        for i in batches:
            coefs.append(penalty.coef)
            penalty.controller.observe(kl_completion=0.5 * i, num_tokens=20, num_completions=10)
        return coefs

    whole, first = (KLPenalty("k1", 0.2, "reward", make()) for _ in range(2))
    expected = run(whole, range(6))
    run(first, range(3))
    resumed = KLPenalty("k1", 0.2, "reward", make())
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(resumed, range(3, 6)) == expected[3:]


def test_controllers_with_senseless_settings_are_refused():
    for make in (lambda: Adaptive(target=0.0, horizon=1.0), lambda: Adaptive(target=1.0, horizon=-1.0)):
        with pytest.raises(ConfigError, match=r"algo\.kl\.controller\.(target|horizon)=.* above 0"):
            make()
    with pytest.raises(ConfigError, match="tokens=0 must be at least 1"):
        Annealed(tokens=0)


def test_what_the_controller_hears_is_the_sampled_kl_of_a_completion(monkeypatch):
    seen: list[dict] = []
    algorithm = build("rloo", "algo/kl_controller=adaptive")
    monkeypatch.setattr(algorithm.kl.controller, "observe", lambda **heard: seen.append(heard))
    batch = algorithm.collect(1)
    total = 0.0
    for i, ids in enumerate(completions(batch)):
        logp, _ = frozen_distributions(algorithm.run.policy, batch, i, 0.8)
        logq, _ = frozen_distributions(algorithm.run.reference, batch, i, 0.8)
        total += sum(float(logp[t, a] - logq[t, a]) for t, a in enumerate(ids))
    (heard,) = seen
    assert heard["kl_completion"] == pytest.approx(total / 6, rel=1e-10)
    assert (heard["num_tokens"], heard["num_completions"]) == (batch.num_tokens, 6)


# The coefficient of a batch stays what it was when the batch was drawn.


def steered(choice: str):
    """A composition whose KL coefficient rises by 12% from batch to batch: each error is clipped to 0.2."""
    controller = ("algo/kl_controller=adaptive", "algo.kl.controller.target=0.001", "algo.kl.controller.horizon=10")
    return build("dr_grpo", f"algo/kl={choice}", "algo.kl.coef=0.5", *controller, "algo.epochs=2")


def test_the_loss_of_a_batch_keeps_its_own_coefficient_after_the_next_batch_was_drawn():
    algorithm = steered("k3")
    first = algorithm.collect(0)
    before = loss_of(algorithm, first, update=1).item()
    second = algorithm.collect(1)
    assert first.coefs["kl"] == 0.5 and second.coefs["kl"] == pytest.approx(0.5 * 1.12, rel=1e-14)
    assert loss_of(algorithm, first, update=1).item() == before
    free = build("dr_grpo", policy=algorithm.run.policy)  # the same without a penalty
    means = Metrics()
    penalty = loss_of(algorithm, first, update=1, metrics=means) - loss_of(free, first, update=1)
    # Dr. GRPO adds tokens up and divides by the rows times the longest completion that may be.
    assert penalty.item() == pytest.approx(0.5 * means.local()["kl"] * first.num_tokens / (6 * 5), rel=1e-9)


@pytest.mark.parametrize("choice", ["k3", "in_reward"])
def test_the_coefficient_that_is_logged_is_the_batchs_own_and_not_the_next_ones(choice):
    algorithm = steered(choice)
    batches = [algorithm.collect(index) for index in range(3)]
    expected = [0.5, 0.5 * 1.12, 0.5 * 1.12**2]
    assert [batch.coefs["kl"] for batch in batches] == pytest.approx(expected, rel=1e-14)
    logged = [batch.metrics.local()["kl_coef"] for batch in batches]
    assert logged == pytest.approx(expected, rel=1e-7)  # a float32


def test_every_cut_of_a_batch_keeps_its_coefficients():
    algorithm = build("ppo", "algo.entropy_coef=0.4", "algo.entropy_decay_batches=4", "algo.minibatches=3")
    batch = algorithm.collect(1)
    assert batch.coefs == {"kl": 0.5, "entropy": pytest.approx(0.3)}
    cuts = [batch.slice(1, 3), batch.select(torch.tensor([0, 4])), batch.by_length(), *batch.micro_batches(max_rows=2)]
    cuts += [algorithm.minibatch(batch, 1, before={}), algorithm.needed(batch)]
    assert all(cut.coefs == batch.coefs for cut in cuts)


def test_the_entropy_bonus_of_a_batch_stays_after_the_next_batch_was_drawn():
    algorithm = build("reinforce", "algo.entropy_coef=0.4", "algo.entropy_decay_batches=2")
    first = algorithm.collect(0)
    before = gradient(loss_of(algorithm, first, update=0), algorithm.run.policy)
    second = algorithm.collect(1)
    assert (first.coefs["entropy"], second.coefs["entropy"]) == (0.4, 0.2)
    assert torch.equal(gradient(loss_of(algorithm, first, update=0), algorithm.run.policy), before)
