from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlft.algos.base import Setup
from rlft.algos.offline.denoise import Denoise
from rlft.config import root_settings
from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.models.gpt2 import GPT2
from rlft.models.scorer import Scorer
from tests.algos.offline.denoising import BLOCK, MASK, Text, bidirectional, denoise, one_block, random_blocks
from tests.oracles.orders import any_order_nll, expected_nll, masks, order_nlls


@pytest.fixture
def algorithm() -> Denoise:
    return denoise(bidirectional(), Text(random_blocks(9, 8, seed=0), random_blocks(70, 8, seed=1)))


def loss_of(algorithm: Denoise, batch: Batch, totals: Denominators | None = None) -> Tensor:
    totals = totals or Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    return algorithm.loss(Scorer(algorithm.run.policy), batch, totals, Metrics(), update=0)


def noised(algorithm: Denoise, ids: list[int], hidden: tuple[int, ...], *, t: float) -> Batch:
    is_hidden = torch.tensor([[i in hidden for i in range(1, len(ids))]])
    return algorithm._noised(torch.tensor([ids]), is_hidden, weight=torch.tensor([1 / t], dtype=torch.float64))


@torch.no_grad()
def expected_loss(algorithm: Denoise, ids: list[int], t: float) -> float:
    """The algorithm's own loss on each mask, weighed with the mask's probability."""
    num_tokens, total = len(ids) - 1, 0.0
    for hidden in masks(ids):
        chance = t ** len(hidden) * (1 - t) ** (num_tokens - len(hidden))
        total += chance * float(loss_of(algorithm, noised(algorithm, ids, hidden, t=t)))
    return total


# The loss, against enumeration


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9, 1.0])
def test_expected_loss_over_all_masks_is_that_of_predicting_each_token_from_a_random_rest(t):
    algorithm = one_block()
    expected = expected_nll(algorithm.run.policy, BLOCK, t) / 4
    assert expected > 1.0
    assert expected_loss(algorithm, BLOCK, t) == pytest.approx(expected, rel=1e-12)


def integrated(algorithm: Denoise, ids: list[int]) -> float:
    """The expected loss over t ~ U(0, 1]: a polynomial in t, which Gauss-Legendre integrates exactly."""
    nodes, weights = np.polynomial.legendre.leggauss(len(ids))
    return sum(0.5 * w * expected_loss(algorithm, ids, (x + 1) / 2) for x, w in zip(nodes, weights, strict=True))


@pytest.mark.parametrize("ids", [[5, 1], [3, 7, 0], BLOCK], ids=str)
def test_the_mean_over_noise_levels_is_the_mean_over_all_orders_of_writing(ids):
    algorithm = one_block(ids)
    orders = order_nlls(algorithm.run.policy, ids)
    assert len(orders) == math.factorial(len(ids) - 1)
    assert integrated(algorithm, ids) == pytest.approx(np.mean(orders) / (len(ids) - 1), rel=1e-12)


def test_the_bound_is_above_the_negative_log_likelihood_and_only_a_single_token_meets_it():
    block = torch.tensor([[3, 0, 0]])
    algorithm = denoise(bidirectional(vocab_size=5), Text(block, block))
    gaps, mass = [], 0.0
    for x, y in itertools.product(range(5), repeat=2):
        nll = any_order_nll(algorithm.run.policy, [3, x, y])
        mass += math.exp(-nll)
        gaps.append(2 * integrated(algorithm, [3, x, y]) - nll)
    assert mass == pytest.approx(1.0, rel=1e-12)  # what the bound is on is a distribution
    assert min(gaps) > 1e-5 and max(gaps) > 0.01
    single = any_order_nll(algorithm.run.policy, [3, 1])
    assert integrated(algorithm, [3, 1]) == pytest.approx(single, rel=1e-12)


def test_loss_and_gradient_are_those_of_a_plain_forward(algorithm):
    policy, batch = algorithm.run.policy, algorithm.collect(0)
    ids, noised_ids = batch.rows.completion_ids, batch.values["noised_ids"]
    hidden = noised_ids == MASK
    inputs = torch.cat([batch.rows.prompt_ids, noised_ids], dim=1)
    logits = policy(inputs)[:, 1:] @ policy.wte.weight[:12].t()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    expected = (nll * hidden * batch.values["weight"][:, None]).sum() / (4 * 7)
    loss = loss_of(algorithm, batch)
    assert 0 < hidden.sum() < 28
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(algorithm, loss), gradients(algorithm, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)


def gradients(algorithm: Denoise, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(algorithm.run.policy.parameters())))


def test_a_shown_token_is_no_target(algorithm):
    batch = algorithm.collect(0)
    hidden = batch.values["noised_ids"] == MASK
    loss = loss_of(algorithm, batch)
    expected = gradients(algorithm, loss)

    def changed(where: Tensor) -> Batch:
        ids = torch.where(where, (batch.rows.completion_ids + 1) % 12, batch.rows.completion_ids)
        return replace(batch, rows=replace(batch.rows, completion_ids=ids))

    other = loss_of(algorithm, changed(~hidden))
    assert torch.equal(other, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients(algorithm, other), expected, strict=True))
    assert not torch.isclose(loss_of(algorithm, changed(hidden)), loss, rtol=1e-3)


def test_micro_batches_change_neither_loss_nor_gradient(algorithm):
    batch = algorithm.collect(0)
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    whole = loss_of(algorithm, batch, totals)
    expected = gradients(algorithm, whole)
    for limits in ({"max_rows": 1}, {"max_rows": 3}, {"max_tokens": 16}):
        parts = list(batch.micro_batches(**limits))
        assert len(parts) > 1
        shares = [loss_of(algorithm, part, totals) for part in parts]
        torch.testing.assert_close(sum(shares), whole, rtol=1e-13, atol=0)
        for got, wanted in zip(gradients(algorithm, sum(shares)), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_micro_batch_in_which_nothing_is_hidden_has_no_loss_and_a_zero_gradient():
    algorithm = one_block()
    loss = loss_of(algorithm, noised(algorithm, BLOCK, (), t=0.01))
    assert float(loss.detach()) == 0.0
    assert all(not g.any() for g in gradients(algorithm, loss))


# The noise


def test_noise_follows_from_seed_step_and_row():
    algorithm = one_block([1] * 30, rows_per_step=3)  # the same text in every row of every step

    def noise(index: int, seed: int = 0) -> list[str]:
        algorithm.run = replace(algorithm.run, settings=replace(algorithm.run.settings, seed=seed))
        values = algorithm.collect(index).values
        return [str(ids) for ids in [values["weight"].tolist(), *values["noised_ids"].tolist()]]

    assert noise(2) == noise(2)
    assert len({text for key in ((2,), (3,), (2, 1)) for text in noise(*key)}) == 3 * 4


def test_noise_hides_tokens_and_changes_none():
    algorithm = denoise(bidirectional(), Text(random_blocks(9, 8, seed=0), random_blocks(2, 8, seed=1)))
    batch = algorithm.collect(0)
    blocks = algorithm.run.data.batch(0, size=4, seed=0)
    assert torch.equal(torch.cat([batch.rows.prompt_ids, batch.rows.completion_ids], dim=1), blocks)
    noised_ids = batch.values["noised_ids"]
    assert ((noised_ids == blocks[:, 1:]) | (noised_ids == MASK)).all()
    assert batch.num_tokens == 4 * 7  # hidden or not


def test_each_row_has_its_share_of_the_noise_levels_and_hides_that_share_of_its_tokens():
    size = 41
    data = Text(random_blocks(7, size, seed=0), random_blocks(2, size, seed=1))
    algorithm = denoise(bidirectional(n_positions=size), data, rows_per_step=5)
    levels, shares = [], []
    for step in range(200):
        batch = algorithm.collect(step)
        levels.append(1 / batch.values["weight"])
        shares.append((batch.values["noised_ids"] == MASK).double().mean(dim=1))
    t, share = torch.stack(levels), torch.stack(shares)  # [200, 5]
    for row in range(5):
        assert t[:, row].min() > 1 - (row + 1) / 5 and t[:, row].max() <= 1 - row / 5
        inside = (t[:, row] - (1 - (row + 1) / 5)) * 5
        assert abs(float(inside.mean()) - 0.5) < 4 / math.sqrt(12 * 200)  # uniform within its stratum
    z = (share - t) * (size - 1) / ((size - 1) * t * (1 - t)).sqrt()  # mean 0, variance 1
    assert float(z.mean(dim=0).abs().max()) < 4 / math.sqrt(200)
    assert float(z.var()) == pytest.approx(1.0, abs=0.2)  # tokens are hidden independently


def test_ranks_share_the_rows_of_a_step_and_their_noise(algorithm):
    whole = algorithm.collect(3).values
    for rank in range(3):
        algorithm.run = replace(algorithm.run, rank=rank, world_size=3)
        mine = algorithm.collect(3).values
        for name, value in mine.items():
            assert torch.equal(value, whole[name][rank::3])


def test_the_lowest_noise_level_is_above_zero(monkeypatch):
    algorithm = one_block(rows_per_step=16)
    largest = torch.zeros(16, 5, dtype=torch.float64)
    largest[:, 0] = 1 - 2.0**-53
    monkeypatch.setattr(algorithm, "_draws", lambda *_, **__: largest)
    batch = algorithm.collect(0)
    assert batch.values["weight"].max() == 16 * 2.0**53
    assert math.isfinite(float(loss_of(algorithm, batch).detach()))


# What is refused, and what is said


def test_a_causal_policy_is_refused():
    data = Text(random_blocks(2, 8, seed=0), random_blocks(2, 8, seed=1))
    policy = GPT2.from_config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ConfigError, match=r"algo=denoise needs a model that attends both ways: .*is_causal=false"):
        denoise(policy, data)


def test_blocks_that_do_not_fit_the_context_are_refused():
    data = Text(random_blocks(2, 9, seed=0), random_blocks(2, 9, seed=1))
    denoise(bidirectional(n_positions=9), data)
    with pytest.raises(ConfigError, match=r"data\.block_size=8: .*9 tokens.* 8 positions; data\.block_size=7 fits"):
        denoise(bidirectional(n_positions=8), data)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sample_rounds": 0}, "must be at least 1, got 0"),
        ({"sample_order": "confidense"}, r"confidence, ancestral, got 'confidense' \(did you mean 'confidence'\?\)"),
        ({"rows_per_step": 5}, "algo.rows_per_step=5 .* a multiple of the 2 processes"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(wrong, message):
    settings = {
        "rows_per_step": 4,
        "eval_blocks": None,
        "eval_levels": 1,
        "sample_rounds": 2,
        "sample_order": "ancestral",
    }
    setup = Setup(root_settings(), has_reference=False, world_size=2)
    Denoise.check(setup, **settings)
    with pytest.raises(ConfigError, match=message):
        Denoise.check(setup, **(settings | wrong))


def test_plan_says_the_tokens_of_a_step(algorithm):
    said = [("tokens per step", "4 blocks x 7 = 28"), ("held-out bound", "2 masks of each block")]
    assert algorithm.plan() == [*said, ("data: train_blocks", "9")]
    assert algorithm.objective == ("eval/loss", "min")
