from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rlft.core.errors import ConfigError
from rlft.rollout import sampling
from rlft.rollout.sampling import Identity, Sampling, choose, filtered, sample, uniforms

# A right sampler's p-value is uniform on (0, 1): with fresh seeds a test with this bound would fail once in a thousand
# times. The seeds are fixed, so a test that passes goes on passing. What a million draws can see is shown beside the
# bound: distributions that are 1 or 2 % wrong must be rejected far below it.
P_BOUND = 1e-3
LAST_BELOW_ONE = 1 - 2.0**-53
NEVER = [0, 5, 6, 31]  # tokens of probability 0: the first, two in a row, the last


@pytest.fixture(params=[256, 3], ids=["whole", "by blocks"], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for a small vocabulary and for one that is first summed by blocks."""
    monkeypatch.setattr(sampling, "BLOCK", request.param)


def distribution(temperature: float = 1.0) -> Tensor:
    """Logits [32] float64, with probabilities from 0 to about 0.2."""
    logits = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.2 / temperature
    logits[NEVER] = -torch.inf
    return logits


def a_million_draws() -> Tensor:
    """Uniforms of 500 prompts, 20 members each, 100 tokens each, as a rollout takes them."""
    numbers = [p for p in range(500) for _ in range(20)]
    members = list(range(20)) * 500
    draws = uniforms(seed=1, stream="rollout", step=3, prompts=numbers, members=members, num_tokens=100)
    return torch.from_numpy(draws).flatten()


def count(draws: Tensor, logits: Tensor) -> np.ndarray:
    """How often each token is drawn."""
    counts = torch.zeros(len(logits), dtype=torch.int64)
    for part in draws.split(50_000):
        ids, _ = sample(logits.expand(len(part), -1), part)
        counts += torch.bincount(ids, minlength=len(logits))
    return counts.numpy()


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    kept = probabilities > 0
    return float(stats.chisquare(counts[kept], probabilities[kept] * counts.sum()).pvalue)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_million_draws_follow_the_exact_probabilities(dtype: torch.dtype) -> None:
    draws = a_million_draws()
    assert len(draws) == 1_000_000
    logits = distribution()
    counts = count(draws, logits.to(dtype))
    exact = logits.softmax(-1).numpy()
    assert p_value(counts, exact) > P_BOUND
    assert counts[NEVER].sum() == 0
    # A temperature that is 1 % off, or one token's probability 2 % off, is seen.
    assert p_value(counts, distribution(temperature=1.01).softmax(-1).numpy()) < P_BOUND / 1000
    bent = exact.copy()
    bent[exact.argmax()] *= 1.02
    assert p_value(counts, bent / bent.sum()) < P_BOUND / 1000


def test_neighbouring_draws_are_independent() -> None:
    """Chi-square of pairs over a 16 x 16 grid: a uniform, and that of the next position, member, prompt, step, seed."""

    def draws(seed: int = 1, step: int = 0, prompt: int = 0, member: int = 0, stream: str = "rollout") -> np.ndarray:
        numbers = [prompt + p for p in range(20) for _ in range(20)]
        members = [member + m for m in range(20)] * 20
        return uniforms(seed=seed, stream=stream, step=step, prompts=numbers, members=members, num_tokens=101)

    first = draws()[:, :100]
    others = {
        "position": draws()[:, 1:],
        "member": draws(member=1)[:, :100],
        "prompt": draws(prompt=1)[:, :100],
        "step": draws(step=1)[:, :100],
        "seed": draws(seed=2)[:, :100],
        "stream": draws(stream="evaluation")[:, :100],
    }
    for name, other in others.items():
        cells = np.histogram2d(first.ravel(), other.ravel(), bins=16, range=[[0, 1], [0, 1]])[0].ravel()
        assert stats.chisquare(cells).pvalue > P_BOUND, name


def test_a_uniform_is_a_function_of_its_identity_only() -> None:
    identity = {"seed": 4, "stream": "rollout", "step": 2}
    whole = uniforms(**identity, prompts=[7, 7, 8, 3], members=[0, 1, 0, 5], num_tokens=9)
    assert whole.dtype == np.float64
    assert (whole >= 0).all() and (whole < 1).all()
    for row, (prompt, member) in enumerate([(7, 0), (7, 1), (8, 0), (3, 5)]):
        alone = uniforms(**identity, prompts=[prompt], members=[member], num_tokens=9)
        np.testing.assert_array_equal(alone[0], whole[row])
    reordered = uniforms(**identity, prompts=[3, 8, 7, 7], members=[5, 0, 1, 0], num_tokens=9)
    np.testing.assert_array_equal(reordered, whole[::-1])
    for num_tokens in (1, 4, 5, 100):  # a longer completion changes no earlier draw
        other = uniforms(**identity, prompts=[7, 7, 8, 3], members=[0, 1, 0, 5], num_tokens=num_tokens)
        shorter = min(num_tokens, 9)
        np.testing.assert_array_equal(other[:, :shorter], whole[:, :shorter])


def test_identities_that_swap_their_numbers_are_different() -> None:
    rows = [
        uniforms(seed=seed, stream=stream, step=step, prompts=[prompt], members=[member], num_tokens=4)[0].tolist()
        for seed, step, prompt, member in itertools.product(range(3), repeat=4)
        for stream in ("rollout", "evaluation")
    ]
    assert len({x for row in rows for x in row}) == 4 * 2 * 3**4


def test_prompts_and_members_must_pair_up() -> None:
    with pytest.raises(ValueError):
        uniforms(seed=0, stream="rollout", step=0, prompts=[1, 2], members=[0], num_tokens=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampling_equals_a_loop_over_the_cumulative_distribution(dtype: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(2)
    logits = torch.randn(400, 11, dtype=torch.float64, generator=noise).mul(3).to(dtype)
    logits[torch.rand(400, 11, generator=noise) < 0.3] = -torch.inf
    logits[:, 4] = 0.0
    draws = torch.rand(400, dtype=torch.float64, generator=noise)
    ids, logprobs = sample(logits, draws)
    for row, draw, token in zip(logits.double().tolist(), draws.tolist(), ids.tolist(), strict=True):
        total, cumulative = math.fsum(math.exp(x) for x in row), 0.0
        for place, x in enumerate(row):
            cumulative += math.exp(x) / total
            if cumulative > draw:
                assert token == place
                break
    assert logprobs.dtype == dtype
    expected_logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("draw", [0.0, 5e-324, 0.25, LAST_BELOW_ONE])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(draw: float) -> None:
    """Zero probability at either end; and sums that rounding leaves a little below or above one."""
    noise = torch.Generator().manual_seed(3)
    logits = torch.randn(2000, 50, dtype=torch.float64, generator=noise) * 4
    logits[:, :3] = logits[:, -3:] = -torch.inf
    logits = torch.cat([logits, logits.float().double()])
    for dtype in (torch.float64, torch.float32):
        ids, logprobs = sample(logits.to(dtype), torch.full((4000,), draw, dtype=torch.float64))
        assert logprobs.isfinite().all()
        if draw == 0.0:
            assert (ids == 3).all()
        assert ((ids >= 3) & (ids <= 46)).all()


def test_a_draw_on_a_boundary_takes_the_next_token() -> None:
    logits = torch.tensor([[0.25, 0.25, 0.0, 0.5]], dtype=torch.float64).log()
    for draw, expected in [(0.0, 0), (0.2499, 0), (0.2501, 1), (0.4999, 1), (0.5001, 3), (LAST_BELOW_ONE, 3)]:
        ids, logprobs = sample(logits, torch.tensor([draw], dtype=torch.float64))
        assert ids.tolist() == [expected]
        assert logprobs.tolist() == pytest.approx([math.log(0.5 if expected == 3 else 0.25)])
    equal = torch.zeros(1, 4, dtype=torch.float64)  # each quarter is exact in binary: token i owns [i/4, (i+1)/4)
    for draw, expected in [(0.25, 1), (0.5, 2), (0.75, 3)]:
        assert sample(equal, torch.tensor([draw], dtype=torch.float64))[0].tolist() == [expected]


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(4)).bfloat16()
    draws = torch.linspace(0, 0.99, 8, dtype=torch.float64)
    ids, logprobs = sample(logits, draws)
    expected_ids, expected = sample(logits.float(), draws)
    assert logprobs.dtype == torch.float32
    assert torch.equal(ids, expected_ids) and torch.equal(logprobs, expected)


def kept(probabilities: list[float], *, top_k: int = 0, top_p: float = 1.0) -> list[int]:
    logits = torch.tensor([probabilities], dtype=torch.float64).log()
    result = filtered(logits, top_k=top_k, top_p=top_p)[0]
    is_kept = result > -torch.inf
    assert torch.equal(result[is_kept], logits[0][is_kept])
    return is_kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        # probabilities 0.1, 0.4, 0.05, 0.25, 0.2: falling, tokens 1, 3, 4, 0, 2 with mass 0.4, 0.65, 0.85, 0.95, 1
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [1, 3, 4]),
        (5, 1.0, [0, 1, 2, 3, 4]),
        (99, 1.0, [0, 1, 2, 3, 4]),
        (0, 1e-9, [1]),
        (0, 0.39, [1]),
        (0, 0.41, [1, 3]),
        (0, 0.64, [1, 3]),
        (0, 0.66, [1, 3, 4]),
        (0, 0.94, [0, 1, 3, 4]),
        (0, 0.96, [0, 1, 2, 3, 4]),
        (3, 0.70, [1, 3]),  # of the three kept, 1 and 3 have 0.65 / 0.85 = 0.76: top-k comes first
        (3, 0.77, [1, 3, 4]),
    ],
)
def test_hand_computed_top_k_and_top_p(top_k: int, top_p: float, expected: list[int]) -> None:
    assert kept([0.1, 0.4, 0.05, 0.25, 0.2], top_k=top_k, top_p=top_p) == expected


def test_ties_with_the_last_of_top_k_are_kept() -> None:
    assert kept([0.25, 0.125, 0.25, 0.125, 0.25], top_k=2) == [0, 2, 4]


def test_filters_work_row_by_row_and_leave_their_input_alone() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64).log()
    before = logits.clone()
    result = filtered(logits, top_k=2, top_p=0.7)
    assert (result > -torch.inf).tolist() == [[False, True, True], [True, True, False]]
    assert torch.equal(logits, before)


def chosen(sampling: Sampling, uniform: float | None, *, done: int = 9) -> tuple[int, float]:
    """Draw from probabilities 0.5 (the end token), 0.3 and 0.2; return the token and its probability."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    draw = None if uniform is None else torch.tensor([uniform], dtype=torch.float64)
    ids, logprobs = choose(logits, draw, sampling=sampling, eos_id=0, done=torch.tensor([done]))
    return int(ids), float(logprobs.exp())


@pytest.mark.parametrize(
    ("sampling", "uniform", "expected"),
    [
        (Sampling(9), 0.51, (1, 0.3)),
        (Sampling(9, temperature=0.5), 0.67, (1, 0.09 / 0.38)),  # 0.25, 0.09, 0.04 of 0.38
        (Sampling(9, temperature=0.5, top_p=0.6), 0.99, (0, 1.0)),  # the nucleus is that of the tempered distribution
        (Sampling(9, top_p=0.6), 0.99, (1, 0.375)),
        (Sampling(9, top_k=2), 0.62, (0, 0.625)),
        (Sampling(9, greedy=True), None, (0, 0.5)),
        (Sampling(9, temperature=2.0, greedy=True), None, (0, 0.5**0.5 / (0.5**0.5 + 0.3**0.5 + 0.2**0.5))),
        (Sampling(9, min_new_tokens=9), 0.0, (0, 0.5)),
    ],
    ids=str,
)
def test_hand_computed_choices(sampling: Sampling, uniform: float | None, expected: tuple[int, float]) -> None:
    token, probability = chosen(sampling, uniform)
    assert (token, probability) == (expected[0], pytest.approx(expected[1], rel=1e-12))


def test_no_end_token_before_min_new_tokens_and_filters_count_without_it() -> None:
    assert chosen(Sampling(9, min_new_tokens=5), 0.0, done=4) == (1, pytest.approx(0.6))
    assert chosen(Sampling(9, min_new_tokens=5, top_k=1), 0.99, done=4) == (1, 1.0)
    assert chosen(Sampling(9, min_new_tokens=5, greedy=True), None, done=4) == (1, pytest.approx(0.6))


def test_an_identitys_uniforms_are_a_tensor_of_the_same_numbers() -> None:
    made = Identity(4, "rollout", 2, [7, 3], [0, 5]).uniforms(9, device=torch.device("cpu"))
    expected = uniforms(seed=4, stream="rollout", step=2, prompts=[7, 3], members=[0, 5], num_tokens=9)
    np.testing.assert_array_equal(made.numpy(), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; at 0 it would be greedy=true"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p in \(0, 1\]"),
        ({"min_new_tokens": 9}, r"min_new_tokens must be in 0 .. max_new_tokens=8, got 9"),
        ({"min_new_tokens": -1}, "min_new_tokens must be in"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**({"max_new_tokens": 8} | wrong))


def test_only_the_policys_own_distribution_is_plain() -> None:
    assert Sampling(8).is_plain
    assert Sampling(8, temperature=0.7).is_plain  # the logprobs are taken at the same temperature
    for bent in ({"top_k": 5}, {"top_p": 0.9}, {"min_new_tokens": 1}, {"greedy": True}):
        assert not Sampling(8, **bent).is_plain


def test_logits_that_are_nan_give_a_token_and_a_nan() -> None:
    """A run that diverged ends by its own check of the loss, not by an index."""
    for vocab_size in (511, 512, 513, 1024):
        ids, logprobs = sample(torch.full((2, vocab_size), torch.nan), torch.tensor([0.0, 0.9], dtype=torch.float64))
        assert ids.min() >= 0 and ids.max() < vocab_size and logprobs.isnan().all()
