"""The held-out bound and the samples of masked diffusion."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlft.algos.offline.denoise import Denoise
from rlft.models.gpt2 import GPT2
from tests.algos.offline.denoising import BLOCK, Text, bidirectional, denoise, one_block, random_blocks
from tests.builders import TOKENIZER
from tests.oracles.orders import hidden_nll, masks, order_nlls


@pytest.fixture
def algorithm() -> Denoise:
    return denoise(bidirectional(), Text(random_blocks(9, 8, seed=0), random_blocks(70, 8, seed=1)))


def moments(policy: GPT2, ids: list[int]) -> dict[int, tuple[float, float]]:
    """Mean and variance of T / n * hidden_nll / T over the masks with n hidden tokens, for each n."""
    values: dict[int, list[float]] = {}
    for hidden in masks(ids):
        if hidden:
            values.setdefault(len(hidden), []).append(hidden_nll(policy, ids, hidden) / len(hidden))
    return {n: (float(np.mean(v)), float(np.var(v))) for n, v in values.items()}


def test_held_out_bound_is_unbiased_and_stratified():
    """1,000 copies of one block against the exact bound: with one mask each, and with one of each size."""
    algorithm = one_block()
    exact = moments(algorithm.run.policy, BLOCK)
    bound = np.mean([mean for mean, _ in exact.values()])
    assert bound == pytest.approx(np.mean(order_nlls(algorithm.run.policy, BLOCK)) / 4, rel=1e-12)
    within = np.mean([variance for _, variance in exact.values()])
    between = np.var([mean for mean, _ in exact.values()])
    algorithm.run.data.held_out = torch.tensor([BLOCK]).expand(1000, -1)
    errors = {}
    for levels, variance in ((1, within + between), (4, within / 4)):
        algorithm.eval_levels = levels
        errors[levels] = 4 * math.sqrt(variance / 1000)
        assert abs(algorithm.evaluate().metrics["eval/loss"] - bound) < errors[levels]
    assert errors[4] < errors[1] / 2 < 0.1 * bound


def test_each_mask_of_a_held_out_block_hides_its_share_of_sizes(monkeypatch):
    algorithm = one_block()
    algorithm.run.data.held_out = torch.tensor([BLOCK]).expand(30, -1)
    sizes: list[list[int]] = []
    noised = algorithm._noised
    monkeypatch.setattr(algorithm, "_noised", lambda *a, **k: sizes.append(a[1].sum(dim=1).tolist()) or noised(*a, **k))
    for levels, allowed in ((4, [{1}, {2}, {3}, {4}]), (2, [{1, 2}, {3, 4}]), (1, [{1, 2, 3, 4}])):
        algorithm.eval_levels = levels
        sizes.clear()
        algorithm.evaluate()
        assert [set(s) for s in sizes] == allowed


def test_bound_of_a_fixed_text_by_hand():
    policy = bidirectional()
    with torch.no_grad():  # a model that knows nothing of context: every hidden state is ln_f's bias
        policy.ln_f.weight.zero_()
        policy.ln_f.bias.zero_()
        policy.ln_f.bias[0] = 1.0
        policy.wte.weight.zero_()
        policy.wte.weight[0, 0] = math.log(4.0)  # so that "a" weighs 4, each of the other eleven 1, and [MASK] nothing
    blocks = torch.tensor([TOKENIZER.encode(text) for text in ("abbbb", "baaaa")])
    metrics = denoise(policy, Text(blocks, blocks), eval_levels=3).evaluate().metrics
    loss = (math.log(15) + math.log(15 / 4)) / 2  # every mask of a block of equal tokens says the same
    assert metrics == pytest.approx({"eval/loss": loss, "eval/perplexity_bound": math.exp(loss)}, rel=1e-12)


def test_evaluation_reads_every_held_out_block_whatever_its_chunks(algorithm, monkeypatch):
    whole = algorithm.evaluate().metrics["eval/loss"]  # 70 blocks: chunks of 32, 32 and 6
    monkeypatch.setattr("rlft.algos.offline.denoise.EVAL_ROWS", 7)
    assert algorithm.evaluate().metrics["eval/loss"] == pytest.approx(whole, rel=1e-12)
    algorithm.run.data.held_out = algorithm.run.data.held_out[:5]
    few = algorithm.evaluate().metrics["eval/loss"]
    algorithm.run.data.held_out, algorithm.eval_blocks = random_blocks(70, 8, seed=1), 5
    assert algorithm.evaluate().metrics["eval/loss"] == few != whole


def test_evaluation_does_not_depend_on_the_runs_seed_and_is_the_same_twice(algorithm):
    first = algorithm.evaluate()
    algorithm.run = replace(algorithm.run, settings=replace(algorithm.run.settings, seed=5))
    assert algorithm.evaluate() == first


@pytest.mark.parametrize("order", ["confidence", "ancestral"])
def test_samples_go_on_from_the_first_token_of_held_out_blocks_to_the_end_of_the_text(algorithm, order):
    algorithm = denoise(algorithm.run.policy, algorithm.run.data, sample_order=order)
    texts = {}
    for longest in (7, 3):
        algorithm.run = replace(algorithm.run, settings=replace(algorithm.run.settings, max_new_tokens=longest))
        samples = algorithm.evaluate().samples
        assert [s["prompt"] for s in samples] == [TOKENIZER.decode([i]) for i in algorithm.run.data.held_out[:5, 0]]
        texts[longest] = [s["completion"] for s in samples]
    assert texts[3] == [text[:3] for text in texts[7]]
    assert max(map(len, texts[7])) <= 7
    assert algorithm._shown([1, 2, 11, 3]) == [1, 2]
