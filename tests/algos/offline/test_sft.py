from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlft.core.batch import Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from tests.algos.offline.builders import build_offline
from tests.builders import TOKENIZER, FixedText, sft, tiny


def random_blocks(count: int, size: int, *, seed: int) -> torch.Tensor:
    return torch.randint(0, 12, (count, size), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def algorithm():
    policy = tiny(spread=0.3).double()
    return sft(policy, FixedText(random_blocks(9, 8, seed=0), random_blocks(70, 8, seed=1)), rows_per_step=4)


def logits(policy, blocks: torch.Tensor) -> torch.Tensor:
    return policy(blocks[:, :-1]) @ policy.head_weight.t()


def cross_entropy(policy, blocks: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits(policy, blocks).flatten(0, 1), blocks[:, 1:].flatten())


def test_loss_and_gradient_are_those_of_torch_cross_entropy(algorithm):
    policy, batch = algorithm.run.policy, algorithm.collect(0)
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    loss = algorithm.loss(Scorer(policy), batch, totals, Metrics(), update=0)
    expected = cross_entropy(policy, algorithm.run.data.batch(0, size=4, seed=0))
    assert batch.num_tokens == 4 * 7
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    for got, wanted in zip(gradients, torch.autograd.grad(expected, list(policy.parameters())), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)


@torch.no_grad()
def test_shares_of_micro_batches_add_up_to_the_loss(algorithm):
    batch, scorer = algorithm.collect(0), Scorer(algorithm.run.policy)
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    whole = float(algorithm.loss(scorer, batch, totals, Metrics(), update=0))
    shares = [float(algorithm.loss(scorer, m, totals, Metrics(), update=0)) for m in batch.micro_batches(max_rows=3)]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(whole, rel=1e-13)


@torch.no_grad()
def test_logged_entropy_is_that_of_the_next_token_distributions(algorithm):
    batch, means = algorithm.collect(1), Metrics()
    algorithm.loss(Scorer(algorithm.run.policy), batch, Denominators(batch.num_tokens, batch.num_rows), means, update=0)
    p = logits(algorithm.run.policy, algorithm.run.data.batch(1, size=4, seed=0)).softmax(-1)
    assert means.local()["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-12)


def test_perplexity_of_a_fixed_text_by_hand(algorithm):
    policy = algorithm.run.policy
    with torch.no_grad():  # a model that knows nothing of context: every hidden state is ln_f's bias
        policy.ln_f.weight.zero_()
        policy.ln_f.bias.zero_()
        policy.ln_f.bias[0] = 1.0
        policy.wte.weight.zero_()
        policy.wte.weight[0, 0] = math.log(4.0)  # so that "a" weighs 4 and each of the other eleven 1
    algorithm.run.data.held_out = torch.tensor([TOKENIZER.encode(text) for text in ("abac", "baaa")])
    metrics = algorithm.evaluate().metrics
    # targets b a c, a a a: four with probability 4/15 and two with 1/15
    loss = (4 * math.log(15 / 4) + 2 * math.log(15)) / 6
    assert metrics == pytest.approx({"eval/loss": loss, "eval/perplexity": math.exp(loss)}, rel=1e-12)


def test_evaluation_reads_every_held_out_block_once_whatever_its_chunks(algorithm):
    blocks = algorithm.run.data.held_out  # 70 blocks: chunks of 32, 32 and 6
    for count in (None, 5):
        algorithm.eval_blocks = count
        expected = float(cross_entropy(algorithm.run.policy, blocks[:count]).detach())
        assert algorithm.evaluate().metrics["eval/loss"] == pytest.approx(expected, rel=1e-12)


def test_evaluation_is_the_same_twice_and_shows_samples(algorithm):
    first, second = algorithm.evaluate(), algorithm.evaluate()
    assert first == second
    assert len(first.samples) == 5


def test_batches_follow_from_seed_and_step(algorithm):
    def ids(index: int) -> list:
        rows = algorithm.collect(index).rows
        return torch.cat([rows.prompt_ids[rows.prompt_of_row], rows.completion_ids], dim=1).tolist()

    assert ids(2) == ids(2) == algorithm.run.data.batch(2, size=4, seed=0).tolist()
    assert ids(2) != ids(3)


def test_ranks_share_the_blocks_of_a_step(algorithm):
    whole = algorithm.collect(0).rows.completion_ids.tolist()
    parts = []
    for rank in range(2):
        algorithm.run = replace(algorithm.run, rank=rank, world_size=2)
        parts += algorithm.collect(0).rows.completion_ids.tolist()
    assert sorted(parts) == sorted(whole)


def test_plan_says_the_tokens_of_a_step(algorithm):
    assert algorithm.plan() == [("tokens per step", "4 blocks x 7 = 28"), ("data: train_blocks", "9")]


def test_lower_loss_is_better(algorithm):
    assert algorithm.objective == ("eval/loss", "min")


def test_blocks_longer_than_the_context_and_a_batch_that_processes_cannot_share_are_refused():
    policy = tiny(n_positions=8)
    whole, longer = (
        FixedText(random_blocks(9, size + 1, seed=0), random_blocks(3, size + 1, seed=1)) for size in (8, 9)
    )
    sft(policy, whole).evaluate()
    with pytest.raises(ConfigError, match=r"data\.block_size=9 must be at most 8, the model's context"):
        sft(policy, longer)
    with pytest.raises(ConfigError, match=r"algo\.rows_per_step=3 must be a multiple of the 2 processes"):
        build_offline("sft", "algo.rows_per_step=3", policy=policy, data=whole, world_size=2)
