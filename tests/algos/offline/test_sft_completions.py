"""Supervised training on completions of prompts: their tokens count, and no token of the prompt does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from tests.algos.offline.builders import build_offline, completions, gradient, loss_of, totals, widened
from tests.builders import TOKENIZER, tiny
from tests.models.tiny import plain_logprobs

RECORDS = [("abc", "ddd"), ("d", "a"), ("efghijk", "ka"), ("jk", "bcdefg"), ("a", "")]


def made(*overrides: str, **given):
    return build_offline("sft", "algo.rows_per_step=4", *overrides, **({"data": completions(RECORDS)} | given))


def naive(algorithm, examples) -> tuple[Tensor, int]:
    """The summed negative logprob of all completion tokens, and their number."""
    rows = [plain_logprobs(algorithm.run.policy, e.prompt.ids, e.completions[0]) for e in examples]
    return -sum(row.sum() for row in rows), sum(map(len, rows))


def test_loss_and_gradient_are_a_mean_over_completion_tokens_with_their_end():
    algorithm = made()
    batch, examples = algorithm.collect(1), algorithm.run.data.batch(1, size=4, seed=0)
    total, count = naive(algorithm, examples)
    assert batch.num_tokens == count == sum(len(TOKENIZER.encode(e.prompt.columns["completion"])) + 1 for e in examples)
    loss = loss_of(algorithm, batch)
    torch.testing.assert_close(loss, total / count, rtol=1e-12, atol=0)
    got, wanted = gradient(loss, algorithm), gradient(total / count, algorithm)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)


def test_padding_and_micro_batches_change_nothing():
    algorithm = made()
    batch = algorithm.collect(1)
    whole = loss_of(algorithm, batch)
    torch.testing.assert_close(loss_of(algorithm, widened(batch)), whole, rtol=1e-12, atol=0)
    scorer, micros = Scorer(algorithm.run.policy), list(batch.micro_batches(max_rows=3))
    shares = [algorithm.loss(scorer, micro, totals(batch), Metrics(), update=0) for micro in micros]
    assert len(shares) == 2
    torch.testing.assert_close(sum(shares), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("count", [None, 2])
def test_perplexity_is_of_the_held_out_completions(count):
    algorithm = made(f"algo.eval_blocks={'null' if count is None else count}")
    total, tokens = naive(algorithm, algorithm.run.data.examples("validation")[:count])
    loss, evaluation = float((total / tokens).detach()), algorithm.evaluate()
    assert evaluation.metrics == pytest.approx({"eval/loss": loss, "eval/perplexity": math.exp(loss)}, rel=1e-12)
    assert [sample["prompt"] for sample in evaluation.samples] == [prompt for prompt, _ in RECORDS[:count]]


def test_evaluation_reads_every_completion_once_whatever_its_pieces():
    records = [(a, b) for a in "abcdefghijk" for b in "abcde"]  # 55: pieces of 32 and 23
    algorithm = made("algo.eval_blocks=null", data=completions(records))
    total, tokens = naive(algorithm, algorithm.run.data.examples("validation"))
    assert algorithm.evaluate().metrics["eval/loss"] == pytest.approx(float((total / tokens).detach()), rel=1e-12)


def test_ranks_share_the_completions_of_a_step():
    whole = made().collect(1)
    parts = [made(rank=rank, world_size=2).collect(1) for rank in range(2)]
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert [part.num_rows for part in parts] == [2, 2]


def test_long_completion_is_refused_with_its_place():
    with pytest.raises(ConfigError, match=r"memory:3: 10 tokens do not fit the model's context of 9"):
        made(policy=tiny(n_positions=9))


def test_plan_says_the_completions_of_a_step():
    assert ("completions per step", "4") in made().plan()
