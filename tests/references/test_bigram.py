"""The bigram reference: counts by hand, the formula in a loop, and the scores that every reference must give."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlft.algos.online.scoring import exact_token_kl, frozen_scores
from rlft.core.batch import Batch
from rlft.core.errors import ConfigError, DataError
from rlft.core.metrics import Metrics
from rlft.data.source import Row
from rlft.functional.logprobs import exact_kl
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer
from rlft.references.bigram import LARGEST_VOCABULARY, Bigram, bigram, pair_counts, smoothed
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from tests.algos.micro import loss_of
from tests.builders import TOKENIZER, policy_gradient, tiny
from tests.models.tiny import random_ids, rows_of
from tests.oracles.loops import categorical_kl, token_logprob

V, EOS = 12, 11
TEXTS = ["abca", "abd", "", "kk"]
PROMPTS = random_ids(1, [3, 1, 7, 20], vocab_size=V)
OF_ROW = [0, 0, 0, 1, 2, 2, 3, 3]
COMPLETIONS = random_ids(2, [5, 1, 9, 23, 2, 8, 5, 4], vocab_size=V)


class Texts:
    """Data over the texts given; other splits hold other texts."""

    def __init__(self, texts: Sequence[str] = TEXTS) -> None:
        self.source, self.texts = self, list(texts)
        self.counts: dict[str, int] = {}

    def rows(self, split: str) -> list[Row]:
        return [Row(text, where=f"list:{i}") for i, text in enumerate(self.texts if split == "train" else ["eee"])]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLFT_CACHE", str(tmp_path))


def made(texts: Sequence[str] = TEXTS, *, policy: CausalLM | None = None, alpha: float = 2.0) -> Bigram:
    return bigram(policy or tiny().double(), data=Texts(texts), tokenizer=TOKENIZER, alpha=alpha)


def naive(texts: Sequence[str], alpha: float, vocab_size: int = V) -> list[list[float]]:
    """log p(b | a), counted by a walk over the texts."""
    pairs = [[0] * vocab_size for _ in range(vocab_size)]
    for text in texts:
        before = EOS  # where every text begins
        for token in [*TOKENIZER.encode(text), EOS]:
            pairs[before][token] += 1
            before = token
    total = sum(map(sum, pairs))
    unigram = [(sum(row[b] for row in pairs) + 1) / (total + vocab_size) for b in range(vocab_size)]
    return [[math.log((row[b] + alpha * unigram[b]) / (sum(row) + alpha)) for b in range(vocab_size)] for row in pairs]


def naive_logprobs(table: Tensor, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    before = [prompt[-1], *completion[:-1]]
    return [token_logprob((table[a] / temperature).tolist(), b)[0] for a, b in zip(before, completion, strict=True)]


def uneven(dtype: torch.dtype = torch.float64) -> Bigram:
    """A table of several nats, no two rows alike."""
    noise = torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Bigram((2 * noise).log_softmax(-1).to(dtype), context_length=24)


def test_counts_are_those_made_by_hand():
    tokens = np.array([0, 1, 2, 0, 11, 0, 1, 3, 11, 11, 10, 10, 11], dtype=np.int32)  # TEXTS, each with its end
    counts = pair_counts(tokens, vocab_size=V)
    once = [(1, 2), (2, 0), (0, 11), (1, 3), (3, 11), (11, 11), (11, 10), (10, 10), (10, 11)]
    expected = dict.fromkeys(once, 1) | {(0, 1): 2, (11, 0): 2}
    assert counts.dtype == torch.int64
    assert {(a, b): int(counts[a, b]) for a, b in counts.nonzero().tolist()} == expected


def test_counts_of_a_large_vocabulary_do_not_overflow_the_tokens_dtype():
    V = LARGEST_VOCABULARY
    tokens = np.array([V - 1, V - 2, V - 1, V - 2], dtype=np.int16)
    counts = pair_counts(tokens, vocab_size=V)
    assert int(counts[V - 1, V - 2]) == int(counts[V - 2, V - 1]) == 2 and int(counts.sum()) == 4


def test_probabilities_are_those_computed_by_hand():
    counts = torch.tensor([[0, 3], [1, 0]])  # p(0) = 2/6, p(1) = 4/6
    expected = [[(0 + 6 * 2 / 6) / 9, (3 + 6 * 4 / 6) / 9], [(1 + 6 * 2 / 6) / 7, (0 + 6 * 4 / 6) / 7]]
    torch.testing.assert_close(
        smoothed(counts, alpha=6.0).exp(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("alpha", [0.01, 2.0, 1000.0])
def test_the_table_is_the_formula_counted_by_a_walk_over_the_texts(alpha):
    table = made(alpha=alpha).log_probs
    assert table.dtype == torch.float64
    torch.testing.assert_close(table, torch.tensor(naive(TEXTS, alpha), dtype=torch.float64), rtol=1e-12, atol=0)
    assert table.isfinite().all()
    torch.testing.assert_close(table.exp().sum(dim=1), torch.ones(V).double(), rtol=1e-14, atol=0)


def test_a_token_that_never_occurred_is_followed_by_the_unigram_distribution():
    table = made().log_probs
    unigram = torch.tensor([4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 3, 5]).double() / 25  # counts and one, of 13 tokens
    for token in (4, 9):
        torch.testing.assert_close(table[token].exp(), unigram, rtol=1e-14, atol=0)


def test_only_the_training_split_is_counted():
    assert made().log_probs[4].exp()[4] == pytest.approx(1 / 25)  # "e", of which validation is full


def test_a_policys_entries_that_the_tokenizer_lacks_have_the_least_mass():
    from rlft.models.gpt2 import GPT2

    policy = GPT2.from_config(vocab_size=15, n_positions=32, n_embd=8, n_layer=1, n_head=2).double()
    table = made(policy=policy).log_probs
    torch.testing.assert_close(table, torch.tensor(naive(TEXTS, 2.0, 15), dtype=torch.float64), rtol=1e-12, atol=0)
    assert bool((table[:, 12:] <= table.min(dim=1, keepdim=True).values).all())


def test_dtype_and_context_are_the_policys_and_nothing_is_trained():
    policy = tiny(n_positions=17)
    model = made(policy=policy)
    assert (model.log_probs.dtype, model.context_length, model.vocab_size) == (torch.float32, 17, V)
    assert not list(model.parameters()) and not model.training
    assert made(policy=policy.double()).log_probs.dtype == torch.float64


def test_the_head_is_the_identity_on_every_device_and_its_product_changes_no_bit():
    model = uneven(torch.float32)
    hidden = model(torch.arange(V)[None])[0]
    assert torch.equal(hidden @ model.head_weight.t(), model.log_probs)
    assert torch.equal(hidden @ model.head_weight.to(torch.float32).T, hidden)
    assert torch.equal(model.head_weight.to_dense(), torch.eye(V))
    elsewhere = copy.deepcopy(model).double().to("meta").head_weight
    assert (elsewhere.layout, elsewhere.dtype, elsewhere.shape) == (torch.strided, torch.float64, (V, V))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shared", [True, False])
def test_the_scorers_logprobs_are_the_tables_entries(temperature, shared):
    model = uneven()
    rows = (
        rows_of(PROMPTS, COMPLETIONS, OF_ROW)
        if shared
        else rows_of([PROMPTS[p] for p in OF_ROW], COMPLETIONS, list(range(8)))
    )
    scores = Scorer(model)(rows, temperature=temperature)
    for row, completion in enumerate(COMPLETIONS):
        expected = naive_logprobs(model.log_probs, PROMPTS[OF_ROW[row]], completion, temperature)
        assert scores.logprobs[row, : len(completion)].tolist() == pytest.approx(expected, rel=1e-12)
    assert not scores.logprobs[~rows.completion_mask].any()


def test_the_scorers_single_causal_pass_gives_the_tables_entries():
    model = uneven()
    prompts, completions = random_ids(4, [1, 1], vocab_size=V), random_ids(5, [9, 4], vocab_size=V)
    scores = Scorer(model)(rows_of(prompts, completions, [0, 1]))
    for row, completion in enumerate(completions):
        expected = naive_logprobs(model.log_probs, prompts[row], completion, 1.0)
        assert scores.logprobs[row, : len(completion)].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("limits", [{"max_rows": None}, {"max_rows": 3}])
def test_frozen_scores_and_the_exact_kl_equal_a_loop_over_the_vocabulary(limits):
    policy, model, temperature = tiny(1, spread=0.4).double(), uneven(), 0.7
    batch = Batch(rows_of(PROMPTS, COMPLETIONS, OF_ROW))
    mask = batch.rows.completion_mask
    hidden, ref_hidden = (
        frozen_scores(each, batch, temperature=temperature, max_tokens=None, **limits)[1] for each in (policy, model)
    )
    assert ref_hidden.shape == (*mask.shape, V)
    kl = exact_token_kl(policy, model, hidden[mask], ref_hidden[mask], temperature=temperature)
    before = [token for row, ids in enumerate(COMPLETIONS) for token in [PROMPTS[OF_ROW[row]][-1], *ids[:-1]]]
    logits = hidden[mask] @ policy.head_weight.T
    expected = [
        categorical_kl((own / temperature).tolist(), (model.log_probs[a] / temperature).tolist())
        for own, a in zip(logits, before, strict=True)
    ]
    assert kl.tolist() == pytest.approx(expected, rel=1e-10)
    assert kl.min() > 0


def test_the_kl_is_finite_for_every_pair_however_surely_the_policy_takes_it():
    model, sure = made(alpha=1e-6), 50 * torch.eye(V).double()  # one token with all but e^-50 of the mass
    for token in range(V):
        rows = model(torch.full((1, V), token))[0]
        kl = exact_kl(sure, rows, torch.eye(V).double(), model.head_weight)
        assert kl.isfinite().all()
        torch.testing.assert_close(kl, -model.log_probs[token], rtol=0, atol=1e-9)


def test_tokens_drawn_from_it_follow_the_table_and_have_its_logprobs():
    """The cache goes along with decoding and compaction, though nothing is in it."""
    model = uneven()
    prompts = [[0, 3], [5], [1, 2, 7]]
    rollout = generate(model, prompts, group_size=400, sampling=Sampling(6), eos_id=EOS, seed=0)
    drawn = torch.zeros(V, V)
    for row, completion in enumerate(rollout.completions()):
        expected = naive_logprobs(model.log_probs, prompts[row // 400], completion, 1.0)
        assert rollout.logprobs[row, : len(completion)].tolist() == pytest.approx(expected, rel=1e-12)
        for a, b in zip([prompts[row // 400][-1], *completion], completion, strict=False):
            drawn[a, b] += 1
    scored = Scorer(model)(rollout.rows).logprobs
    torch.testing.assert_close(scored, rollout.logprobs, rtol=1e-12, atol=0)
    often = drawn.sum(dim=1) > 200
    assert int(often.sum()) >= 3
    p = model.log_probs.exp()[often]
    error = (drawn[often] / drawn[often].sum(dim=1, keepdim=True) - p) / (
        p * (1 - p) / drawn[often].sum(1)[:, None]
    ).sqrt()
    assert float(error.abs().max()) < 4.0  # standard errors, of at most 144 frequencies


@pytest.mark.parametrize("kl", ["k3", "k2", "in_reward"])
def test_a_policy_gradient_is_held_to_it(kl):
    policy, model = tiny(2, spread=0.3).double(), made()
    algorithm = policy_gradient("grpo", f"algo/kl={kl}", "algo.kl.coef=0.1", policy=policy, reference=model)
    batch, means = algorithm.collect(0), Metrics()
    loss = loss_of(algorithm, batch, update=0, metrics=means)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    rows, table = batch.rows, torch.tensor(naive(TEXTS, 2.0), dtype=torch.float64)
    ratios = []
    for b in range(batch.num_rows):
        p = int(rows.prompt_of_row[b])
        prompt = rows.prompt_ids[p, : int(rows.prompt_lengths[p])].tolist()
        completion = rows.completion_ids[b][rows.completion_mask[b]].tolist()
        expected = naive_logprobs(table, prompt, completion, 1.0)
        assert batch.values["ref_logprobs"][b, : len(completion)].tolist() == pytest.approx(expected, rel=1e-10)
        ratios += [float(o) - r for o, r in zip(batch.values["old_logprobs"][b], expected, strict=False)]
    estimate = {"k3": lambda d: math.exp(-d) - 1 + d, "k2": lambda d: d * d / 2, "in_reward": lambda d: d}[kl]
    assert means.local()["kl"] == pytest.approx(sum(map(estimate, ratios)) / len(ratios), rel=1e-9)
    assert 0 < means.local()["kl_exact"] < 10


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_that_leaves_pairs_without_mass_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"reference\.alpha=.* must be above 0 and finite"):
        made(alpha=alpha)


def test_a_vocabulary_whose_table_would_not_fit_is_refused_before_it_is_counted():
    policy: Any = SimpleNamespace(vocab_size=50257)
    with pytest.raises(ConfigError, match=r"50,257 would take 9 GiB, and at most 8,192 is allowed.*reference=initial"):
        made(policy=policy)


def test_data_without_text_is_refused():
    with pytest.raises(DataError, match="the train split has no text to count"):
        made([])


def test_it_is_a_reference_and_is_not_exported(tmp_path):
    with pytest.raises(ConfigError, match="a reference only"):
        made().save_hf(tmp_path)
    assert made().config_dict() == {"vocab_size": V, "context_length": 32}
