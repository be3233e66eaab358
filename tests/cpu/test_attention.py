from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.core.batch import Rows
from rlft.cpu import attention, compiled
from rlft.cpu.attention import Segments, attend, fits
from rlft.models.scorer import Scorer
from tests.models.tiny import random_ids, rows_of, tiny

pytest.importorskip("numba")

# Lengths around what is computed at once: 6 keys, 16 queries, 64 queries; contexts that nobody continues, empty rows.
CONTEXTS = [5, 33, 1, 64, 130]
ROWS = [[3, 70, 16], [0, 1, 17], [130, 64, 65], [], [63, 6]]


@pytest.fixture(params=[1, 2, 5], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by an entry with every call of compiled code on this module's behalf."""
    calls, run = [], attention._in_threads
    monkeypatch.setattr(attention, "_in_threads", lambda *args: calls.append("call") or run(*args))
    return calls


def segments(contexts: list[int], rows: list[list[int]], *, is_shuffled: bool = False) -> tuple[Segments, int]:
    """Contexts and then their rows, one after the other; return also how many tokens they are."""
    sizes = contexts + [size for group in rows for size in group]
    table = torch.tensor(sizes)
    places = torch.stack([table.cumsum(0) - table, table], dim=1)
    owners = torch.tensor([p for p, group in enumerate(rows) for _ in group], dtype=torch.int64)
    of_rows = places[len(contexts) :]
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(7)) if is_shuffled else slice(None)
    made = Segments.of(places[: len(contexts)], of_rows[order], owners[order])
    assert made is not None
    return made, sum(sizes)


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def masked(qkv: Tensor, which: Segments, num_heads: int) -> Tensor:
    """Torch's attention of all tokens to all, in float64, under a mask of who sees whom."""
    N, C = len(qkv), qkv.shape[1] // 3
    seen = torch.zeros(N, N, dtype=torch.bool)
    for start, n in [*which.contexts.tolist(), *which.rows.tolist()]:
        seen[start : start + n, start : start + n] = torch.ones(n, n, dtype=torch.bool).tril()
    for p, (context, m) in enumerate(which.contexts.tolist()):
        for start, n in which.rows[which.first_row[p] : which.first_row[p + 1]].tolist():
            seen[start : start + n, context : context + m] = True
    q, k, v = (x.view(N, num_heads, -1).transpose(0, 1) for x in qkv.double().split(C, dim=1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1).reshape(N, C)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(2, 16), (3, 32), (1, 48), (2, 64), (1, 80)])
@pytest.mark.parametrize("is_shuffled", [False, True], ids=["in order", "shuffled"])
def test_values_and_gradients_are_those_of_masked_attention(
    num_heads: int, head_dim: int, is_shuffled: bool, threads: None
) -> None:
    which, N = segments(CONTEXTS, ROWS, is_shuffled=is_shuffled)
    qkv, weights = drawn(N, 3 * num_heads * head_dim), drawn(N, num_heads * head_dim, seed=1)
    ours, theirs = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, expected = attend(ours, which, num_heads), masked(theirs, which, num_heads)
    (grad,) = torch.autograd.grad((out * weights).sum(), ours)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), theirs)
    assert expected.abs().max() > 1 and expected_grad.abs().max() > 1
    # Sums of up to 260 terms of size 1: a few dozen of float32's roundings, 6e-8 each.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("contexts", "rows"),
    [([40, 3] * 9 + [70], [[9, 2], [], [66]] * 6 + [[5]]), ([33], [[70, 3]]), ([33, 9], [[70], [5, 8]])],
    ids=["more contexts than parts", "one", "two"],
)
def test_whoever_computes_which_contexts_and_heads(contexts: list[int], rows: list[list[int]], threads: None) -> None:
    """A thread takes several contexts, one, or some of its heads, with what it computed last still in its hands."""
    which, N = segments(contexts, rows)
    given, weights = drawn(N, 3 * 3 * 16).requires_grad_(), drawn(N, 3 * 16, seed=1)
    exact = given.detach().double().requires_grad_()
    out, expected = attend(given, which, 3), masked(exact, which, 3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)
    (grad,) = torch.autograd.grad((out * weights).sum(), given)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-5)


def test_contexts_alone_attend_causally() -> None:
    which, N = segments([7, 90], [[], []])
    qkv = drawn(N, 96)
    torch.testing.assert_close(attend(qkv, which, 2).double(), masked(qkv, which, 2), rtol=0, atol=3e-6)


def results(qkv: Tensor, which: Segments) -> tuple[Tensor, Tensor]:
    given = qkv.clone().requires_grad_()
    out = attend(given, which, 2)
    return out.detach(), torch.autograd.grad((out * out.detach().sin()).sum(), given)[0]


def test_bits_depend_on_a_context_and_its_rows_alone() -> None:
    (which, N), before = segments(CONTEXTS, ROWS), torch.get_num_threads()
    qkv = drawn(N, 96)
    together = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            together.append(results(qkv, which))
    finally:
        torch.set_num_threads(before)
    for other in together[1:]:
        assert all(torch.equal(a, b) for a, b in zip(together[0], other, strict=True))
    for p, (context, group) in enumerate(zip(CONTEXTS, ROWS, strict=True)):
        places = [
            *which.contexts[p : p + 1].tolist(),
            *which.rows[which.first_row[p] : which.first_row[p + 1]].tolist(),
        ]
        tokens = torch.cat([torch.arange(start, start + n) for start, n in places])
        alone = results(qkv[tokens], segments([context], [group])[0])
        assert all(torch.equal(a, b[tokens]) for a, b in zip(alone, together[0], strict=True))


def test_a_row_that_is_nan_spoils_its_own_group_alone() -> None:
    which, N = segments([5, 9], [[20, 3], [20]])
    qkv = drawn(N, 96)
    clean = results(qkv, which)
    qkv[int(which.rows[0, 0]) + 4, 5] = torch.nan  # a query of the first context's first row
    out, grad = results(qkv, which)
    hit = torch.zeros(N, dtype=torch.bool)
    hit[int(which.rows[0, 0]) + 4] = True
    assert torch.equal(out.isnan().any(1), hit)
    first = torch.cat([torch.arange(5), torch.arange(14, 37)])  # the first context and its rows
    second = torch.cat([torch.arange(5, 14), torch.arange(37, N)])
    assert grad[first].isnan().any() and torch.equal(grad[second], clean[1][second])


def test_large_scores_do_not_overflow() -> None:
    which, N = segments([5, 9], [[20, 3], [20]])
    qkv = drawn(N, 96) * 40
    # Scores of thousands are rounded by some 1e-4, weights by as much of themselves, and values are up to 150.
    torch.testing.assert_close(attend(qkv, which, 2).double(), masked(qkv, which, 2), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("qkv", "num_heads", "expected"),
    [
        (torch.zeros(1, 4, 96), 2, True),
        (torch.zeros(1, 4, 96), 4, False),
        (torch.zeros(1, 4, 120), 2, False),
        (torch.zeros(1, 4, 96).double(), 2, False),
        (torch.zeros(1, 4, 96).bfloat16(), 2, False),
    ],
    ids=["it fits", "narrow heads", "no whole vectors", "float64", "bfloat16"],
)
def test_what_it_takes(qkv: Tensor, num_heads: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(qkv, num_heads) == expected
    monkeypatch.setattr(compiled, "is_possible", lambda: False)
    assert not fits(qkv, num_heads)


@pytest.mark.parametrize(
    ("contexts", "rows", "owners"),
    [
        ([[0, 3]], [[4, 2]], [0]),  # a token in none
        ([[0, 3]], [[2, 2]], [0]),  # in two
        ([[0, 3], [3, -1]], [[2, 2]], [0]),
        ([[0, 3]], [[3, 2]], [1]),
    ],
)
def test_segments_that_are_none_are_refused(
    contexts: list[list[int]], rows: list[list[int]], owners: list[int]
) -> None:
    with pytest.raises(ValueError, match="every token must be in one segment"):
        Segments.of(torch.tensor(contexts), torch.tensor(rows), torch.tensor(owners))


@pytest.mark.parametrize("size", [(9, 96), (1, 8, 96)])
def test_tokens_of_other_segments_are_refused(size: tuple[int, ...]) -> None:
    which, _ = segments([5], [[3]])
    with pytest.raises(ValueError, match="of the segments' 8 tokens"):
        attend(torch.zeros(size), which, 2)


SHARED = rows_of(random_ids(1, [3, 1, 7, 20]), random_ids(2, [5, 1, 9, 23, 2, 8]), [0, 2, 0, 1, 2, 2])
UNSHARED = rows_of(random_ids(1, [3, 1, 7, 20]), random_ids(2, [5, 1, 9, 23]), [0, 1, 2, 3])


@pytest.mark.parametrize("rows", [SHARED, UNSHARED], ids=["shared", "unshared"])
def test_a_model_scores_by_it_as_in_float64(rows: Rows, calls: list[str]) -> None:
    """Every row's logprobs, and the gradient of all weights."""
    policy, weights = tiny(n_embd=32, n_positions=48, dtype=torch.float32), drawn(*rows.completion_ids.shape)

    def scored() -> tuple[Tensor, ...]:
        logprobs = Scorer(policy)(rows).logprobs
        return logprobs.detach(), *torch.autograd.grad((logprobs * weights).sum(), list(policy.parameters()))

    ours = scored()
    assert len(calls) == 4  # two layers, there and back
    policy = policy.double()
    exact = scored()
    assert len(calls) == 4
    for got, expected in zip(ours, exact, strict=True):
        # Logits of several nats; gradients are sums over 48 to 70 tokens.
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-4)


def test_dropout_and_autocast_are_torchs(calls: list[str]) -> None:
    scorer = Scorer(tiny(n_embd=32, n_positions=48, dtype=torch.float32, dropout=0.5))
    scorer.train()(SHARED)
    with torch.autocast("cpu", torch.bfloat16):
        scorer.eval()(SHARED)
    assert not calls
    scorer(SHARED)
    assert len(calls) == 2
