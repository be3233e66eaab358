from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rlft.core.errors import ConfigError
from rlft.models.gpt2 import GPT2, GPT2Config
from rlft.rollout.sampling import uniforms
from rlft.rollout.unmask import ORDERS, Unmasking, unmask
from tests.models.tiny import shaken
from tests.oracles.orders import logprobs

MASK = 12
ROUNDS = [1, 2, 5, 40]


def bidirectional(seed: int = 0) -> GPT2:
    return shaken(GPT2(GPT2Config(12, 16, 16, 2, 2, is_causal=False)).double(), seed).eval()


def without_context(seed: int = 0) -> GPT2:
    """One distribution for every place, whatever is around it."""
    policy = bidirectional(seed)
    with torch.no_grad():
        policy.ln_f.weight.zero_()
    return policy


def canvas(count: int = 6, size: int = 9, *, seed: int = 0) -> Tensor:
    """Rows of random tokens of which about half are hidden; the first row hides all, the second none."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (count, size), generator=noise)
    hidden = torch.rand(count, size, generator=noise) < 0.5
    hidden[0], hidden[1] = True, False
    return ids.masked_fill(hidden, MASK)


def filled(policy: GPT2, ids: Tensor, order: str, num_rounds: int, *, temperature: float = 1.0, **identity) -> Tensor:
    return unmask(policy, ids, how=Unmasking(num_rounds, order, temperature), **({"seed": 3} | identity))


def drawn(kind: int, rows: int, size: int) -> np.ndarray:
    """The uniforms [rows, size] of seed 3: kind 0 for tokens, 1 for times."""
    numbers = list(range(rows))
    return uniforms(seed=3, stream="unmask", step=0, prompts=numbers, members=[kind] * rows, num_tokens=size)


def inverse(logprobs: list[float], uniform: float) -> int:
    """The first token whose cumulative probability exceeds the uniform."""
    total = 0.0
    for token, logprob in enumerate(logprobs):
        total += math.exp(logprob)
        if total > uniform:
            return token
    raise AssertionError("a draw in the rounding of the last digit")


@pytest.mark.parametrize("num_rounds", ROUNDS)
@pytest.mark.parametrize("order", ORDERS)
def test_everything_hidden_is_filled_in_and_nothing_given_changes(order: str, num_rounds: int) -> None:
    ids = canvas()
    before = ids.clone()
    made = filled(bidirectional(), ids, order, num_rounds)
    assert torch.equal(ids, before)
    assert ((made >= 0) & (made < 12)).all()
    assert torch.equal(made[ids != MASK], ids[ids != MASK])


@pytest.mark.parametrize("order", ORDERS)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(order: str) -> None:
    policy, ids = bidirectional(), canvas()
    together = filled(policy, ids, order, 4)
    for row in range(len(ids)):
        assert torch.equal(filled(policy, ids[row : row + 1], order, 4, first_row=row)[0], together[row])
    assert torch.equal(filled(policy, ids[2:5], order, 4, first_row=2), together[2:5])


@pytest.mark.parametrize("order", ORDERS)
def test_draws_follow_from_seed_stream_step_and_row(order: str) -> None:
    policy, ids = bidirectional(), torch.full((3, 9), MASK)
    made = filled(policy, ids, order, 4)
    assert torch.equal(filled(policy, ids, order, 4), made)
    assert len({str(row) for row in made.tolist()}) == 3
    for other in ({"seed": 4}, {"step": 1}, {"stream": "eval"}, {"first_row": 3}):
        assert not torch.equal(filled(policy, ids, order, 4, **other), made), other


@pytest.mark.parametrize("order", ORDERS)
def test_without_context_any_number_of_rounds_gives_the_same_tokens(order: str) -> None:
    policy, ids = without_context(), canvas()
    expected, draws = ids.tolist(), drawn(0, 6, 9)
    probabilities = logprobs(policy, [MASK] * 9, ())[0]
    for row, i in (ids == MASK).nonzero().tolist():
        expected[row][i] = inverse(probabilities, draws[row, i])
    for num_rounds in ROUNDS:
        assert filled(policy, ids, order, num_rounds).tolist() == expected


def naive(policy: GPT2, ids: list[int], row: int, order: str, num_rounds: int, temperature: float) -> list[int]:
    """One row, one round after the other, in Python lists."""
    ids, size = list(ids), len(ids)
    draws, times = drawn(0, row + 1, size)[row], drawn(1, row + 1, size)[row]
    total = ids.count(MASK)
    for k in range(num_rounds):
        hidden = [i for i in range(size) if ids[i] == MASK]
        table = logprobs(policy, ids, ())
        tokens, surest = {}, {}
        for i in hidden:
            weights = torch.tensor(table[i], dtype=torch.float64) / temperature
            tokens[i] = inverse(weights.log_softmax(-1).tolist(), draws[i])
            surest[i] = table[i][tokens[i]]
        if order == "ancestral":
            shown = [i for i in hidden if times[i] >= 1 - (k + 1) / num_rounds]
        else:
            count = total // num_rounds + (1 if k < total % num_rounds else 0)
            shown = sorted(hidden, key=lambda i: -surest[i])[:count]
        for i in shown:
            ids[i] = tokens[i]
    return ids


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("num_rounds", ROUNDS)
@pytest.mark.parametrize("order", ORDERS)
def test_rounds_are_those_of_a_naive_loop(order: str, num_rounds: int, temperature: float) -> None:
    policy, ids = bidirectional(1), canvas(seed=1)
    made = filled(policy, ids, order, num_rounds, temperature=temperature)
    for row in range(len(ids)):
        assert made[row].tolist() == naive(policy, ids[row].tolist(), row, order, num_rounds, temperature)


def test_orders_and_rounds_make_a_difference() -> None:
    policy, ids = bidirectional(1), torch.full((4, 9), MASK)
    texts = [
        filled(policy, ids, order, n).tolist() for order, n in (("confidence", 2), ("confidence", 9), ("ancestral", 9))
    ]
    assert all(a != b for a, b in itertools.combinations(texts, 2))


@pytest.mark.parametrize(
    ("num_hidden", "num_rounds", "expected"),
    [(7, 3, [7, 4, 2]), (6, 3, [6, 4, 2]), (2, 5, [2, 1]), (9, 1, [9]), (0, 4, [])],
)
def test_confidence_shows_an_equal_number_in_each_round(
    num_hidden: int, num_rounds: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, seen = bidirectional(), []
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda ids: seen.append(int((ids == MASK).sum())) or forward(ids))
    filled(policy, torch.tensor([[MASK] * num_hidden + [1] * (9 - num_hidden)]), "confidence", num_rounds)
    assert seen == expected


def test_ancestral_follows_the_exact_distribution_of_its_rounds() -> None:
    """Two hidden tokens, four rounds: with probability 1/4 in the same round, else one after the other."""
    policy, count = bidirectional(5), 8_000
    first = np.exp(logprobs(policy, [4, MASK, MASK], ())[1:])  # [2, 12]
    exact = np.zeros((12, 12))
    for a, b in itertools.product(range(12), repeat=2):
        second_then = math.exp(logprobs(policy, [4, a, MASK], ())[2][b])
        first_then = math.exp(logprobs(policy, [4, MASK, b], ())[1][a])
        one_by_one = (first[0, a] * second_then + first[1, b] * first_then) / 2
        exact[a, b] = first[0, a] * first[1, b] / 4 + one_by_one * 3 / 4
    made = filled(policy, torch.tensor([[4, MASK, MASK]]).expand(count, -1), "ancestral", 4).numpy()
    counts = np.bincount(made[:, 1] * 12 + made[:, 2], minlength=144)

    def p_value(probabilities: np.ndarray) -> float:
        order = np.argsort(probabilities)
        rare = order[: int((np.cumsum(probabilities[order]) < 20 / count).sum()) + 1]  # cells too rare for chi-square
        keep = np.setdiff1d(order, rare)
        observed = np.append(counts[keep], counts[rare].sum())
        return float(
            stats.chisquare(observed, np.append(probabilities[keep], probabilities[rare].sum()) * count).pvalue
        )

    assert p_value(exact.flatten()) > 1e-3
    assert p_value(np.outer(first[0], first[1]).flatten()) < 1e-9  # as if all were drawn in one round


@pytest.mark.parametrize("order", ORDERS)
def test_a_low_temperature_takes_the_likeliest(order: str) -> None:
    policy, ids = bidirectional(), torch.full((5, 9), MASK)
    made = filled(policy, ids, order, 1, temperature=1e-6)
    likeliest = np.argmax(logprobs(policy, [MASK] * 9, ()), axis=1)
    assert made.tolist() == [likeliest.tolist()] * 5


def test_a_policy_in_training_stays_in_training_and_is_sampled_without_dropout() -> None:
    policy = shaken(GPT2(GPT2Config(12, 16, 16, 1, 2, dropout=0.5, is_causal=False)).double(), 0)
    ids = torch.full((4, 9), MASK)
    expected = filled(policy.eval(), ids, "confidence", 3)
    assert torch.equal(filled(policy.train(), ids, "confidence", 3), expected)
    assert policy.training


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_rounds": 0}, "must be at least 1, got 0"),
        ({"order": "confidense"}, r"one of confidence, ancestral, got 'confidense' \(did you mean 'confidence'\?\)"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Unmasking(**({"num_rounds": 3} | wrong))


def test_a_causal_model_is_refused() -> None:
    policy = GPT2.from_config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ConfigError, match=r"a causal model has no \[MASK\]"):
        filled(policy, torch.zeros(1, 4, dtype=torch.int64), "confidence", 2)
