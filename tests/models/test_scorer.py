from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rlft.core.batch import Batch, Rows
from rlft.functional.aggregation import token_mean
from rlft.models import gpt2
from rlft.models.gpt2 import GPT2
from rlft.models.scorer import Scorer
from tests.models.tiny import logits_of, plain_logprobs, random_ids, rows_of, tiny

# Unequal prompts, shared by 3, 1, 2 and 2 rows; in a context of 24 the last rows end at the last position.
PROMPTS = random_ids(1, [3, 1, 7, 20])
OF_ROW = [0, 0, 0, 1, 2, 2, 3, 3]
COMPLETIONS = random_ids(2, [5, 1, 9, 23, 2, 8, 5, 4])
WIDTH = 23


@pytest.fixture(params=["packed", "padded"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds in every way that a policy is called."""
    monkeypatch.setattr(GPT2, "takes_packed", request.param != "padded")


def shared(**padding: int) -> Rows:
    return rows_of(PROMPTS, COMPLETIONS, OF_ROW, **padding)


def unshared() -> Rows:
    """The same rows, each with a prompt of its own."""
    return rows_of([PROMPTS[p] for p in OF_ROW], COMPLETIONS, list(range(len(OF_ROW))))


def per_row(values: Tensor) -> list[Tensor]:
    return [row[: len(completion)] for row, completion in zip(values, COMPLETIONS, strict=True)]


def gradient(policy: GPT2, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(policy.parameters())))


def assert_same_gradients(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    assert max(float(g.abs().max()) for g in expected) > 0.01
    assert max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) < bound


def weights(seed: int = 3) -> Tensor:
    """What a loss may weigh the tokens with, `[B, T]`."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(len(OF_ROW), WIDTH, dtype=torch.float64, generator=noise)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [shared(), unshared()], ids=["shared", "unshared"])
def test_logprobs_and_entropy_equal_those_of_a_plain_forward(rows: Rows, temperature: float) -> None:
    policy = tiny()
    scores = Scorer(policy)(rows, temperature=temperature)
    assert scores.logprobs.shape == scores.entropy.shape == (8, WIDTH)
    for b, (logprobs, entropy) in enumerate(zip(per_row(scores.logprobs), per_row(scores.entropy), strict=True)):
        prompt, completion = PROMPTS[OF_ROW[b]], COMPLETIONS[b]
        expected = plain_logprobs(policy, prompt, completion, temperature=temperature)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
        logits = logits_of(policy, torch.tensor([prompt + completion[:-1]]))[0, len(prompt) - 1 :]
        exact = torch.distributions.Categorical(logits=logits / temperature).entropy()
        torch.testing.assert_close(entropy, exact, rtol=0, atol=1e-12)
    assert torch.equal(scores.logprobs[~rows.completion_mask], torch.zeros(int((~rows.completion_mask).sum())).double())
    assert torch.equal(scores.entropy[~rows.completion_mask], torch.zeros(int((~rows.completion_mask).sum())).double())
    assert scores.hidden.shape == (sum(map(len, COMPLETIONS)), 16)


def test_plain_text_rows_of_one_context_token_take_one_causal_pass() -> None:
    policy = tiny()
    prompts, completions = random_ids(4, [1, 1, 1]), random_ids(5, [23, 4, 1])
    order = [2, 0, 1]
    logprobs = Scorer(policy)(rows_of(prompts, completions, order)).logprobs
    for b, completion in enumerate(completions):
        expected = plain_logprobs(policy, prompts[order[b]], completion)
        torch.testing.assert_close(logprobs[b, : len(completion)], expected, rtol=0, atol=1e-12)


def test_completions_of_a_single_token() -> None:
    policy = tiny()
    logprobs = Scorer(policy)(rows_of(PROMPTS, [[1], [2], [3]], [0, 2, 2])).logprobs
    expected = [plain_logprobs(policy, PROMPTS[p], [i]) for p, i in [(0, 1), (2, 2), (2, 3)]]
    torch.testing.assert_close(logprobs, torch.stack(expected), rtol=0, atol=1e-12)


def test_the_gradient_of_shared_prompts_is_that_of_unshared_ones_and_of_plain_forwards() -> None:
    policy = tiny()
    scorer = Scorer(policy)
    got = gradient(policy, (scorer(shared()).logprobs * weights()).sum())
    each = gradient(policy, (scorer(unshared()).logprobs * weights()).sum())
    loss = torch.zeros((), dtype=torch.float64)
    for b, completion in enumerate(COMPLETIONS):
        logprobs = plain_logprobs(policy, PROMPTS[OF_ROW[b]], completion)
        loss = loss + (logprobs * weights()[b, : len(completion)]).sum()
    plain = gradient(policy, loss)
    assert_same_gradients(got, each, 1e-10)
    assert_same_gradients(got, plain, 1e-10)


def test_the_entropy_carries_a_gradient_only_where_asked() -> None:
    policy = tiny()
    scores = Scorer(policy)(shared(), entropy_grad=True)
    assert float(gradient(policy, scores.entropy.sum())[0].abs().max()) > 0.01
    assert not Scorer(policy)(shared()).entropy.requires_grad


@pytest.mark.parametrize("extra", [0, 5])
def test_padding_changes_nothing(extra: int) -> None:
    """Whatever ids the padding holds, and however wide it is, even past the last position."""
    policy = tiny()
    expected = Scorer(policy)(shared())
    got = Scorer(policy)(shared(filler=11, extra=extra if extra + 20 <= 24 else 4))
    width = expected.logprobs.shape[1]
    torch.testing.assert_close(got.logprobs[:, :width], expected.logprobs, rtol=0, atol=1e-12)
    assert not got.logprobs[:, width:].any()
    got_gradient = gradient(policy, (got.logprobs[:, :width] * weights()).sum())
    assert_same_gradients(got_gradient, gradient(policy, (expected.logprobs * weights()).sum()), 1e-10)


def test_the_order_of_rows_and_prompts_changes_nothing() -> None:
    policy = tiny()
    order, prompt_order = [5, 0, 7, 3, 1, 4, 6, 2], [2, 0, 3, 1]
    place = {p: i for i, p in enumerate(prompt_order)}
    rows = rows_of(
        [PROMPTS[p] for p in prompt_order], [COMPLETIONS[b] for b in order], [place[OF_ROW[b]] for b in order]
    )
    expected = Scorer(policy)(shared()).logprobs
    torch.testing.assert_close(Scorer(policy)(rows).logprobs, expected[order], rtol=0, atol=1e-12)


def test_other_rows_change_nothing() -> None:
    policy = tiny()
    expected = Scorer(policy)(shared()).logprobs
    for b, completion in enumerate(COMPLETIONS):
        alone = Scorer(policy)(rows_of([PROMPTS[OF_ROW[b]]], [completion], [0])).logprobs
        torch.testing.assert_close(alone[0], expected[b, : len(completion)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [shared(), unshared()], ids=["shared", "unshared"])
@pytest.mark.parametrize(
    "cut",
    [{"max_rows": 1}, {"max_rows": 3}, {"max_rows": 99}, {"max_tokens": 60}, {"max_rows": 2, "max_tokens": 40}],
    ids=str,
)
def test_micro_batches_sum_to_the_gradient_of_the_whole(rows: Rows, cut: dict) -> None:
    policy = tiny()
    scorer = Scorer(policy)
    batch = Batch(rows, {"weights": weights(), "scale": torch.arange(1.0, 9.0, dtype=torch.float64)})

    def loss(part: Batch) -> Tensor:
        per_token = scorer(part.rows).logprobs * part.values["weights"] * part.values["scale"][:, None]
        return token_mean(per_token, part.rows.completion_mask, num_tokens=batch.num_tokens)

    whole = gradient(policy, loss(batch))
    parts = list(batch.micro_batches(**cut))
    summed = [torch.zeros_like(p) for p in policy.parameters()]
    for part in parts:
        summed = [s + g for s, g in zip(summed, gradient(policy, loss(part)), strict=True)]
    assert_same_gradients(summed, whole, 1e-10)
    assert sum(part.num_rows for part in parts) == batch.num_rows
    assert sum(part.num_tokens for part in parts) == batch.num_tokens == sum(map(len, COMPLETIONS))


@pytest.mark.parametrize("rows", [shared(), unshared()], ids=["shared", "unshared"])
@pytest.mark.parametrize("max_tokens", [30, 50, 60, 100, 1000])
def test_micro_batches_hold_what_was_asked_for(rows: Rows, max_tokens: int) -> None:
    for max_rows in (1, 2, 5, None):
        parts = list(Batch(rows).micro_batches(max_rows=max_rows, max_tokens=max_tokens))
        for part in parts:
            held = part.num_rows * (part.rows.prompt_ids.shape[1] + part.rows.completion_ids.shape[1])
            assert held <= max_tokens or part.num_rows == 1
            assert max_rows is None or part.num_rows <= max_rows
        ids = [part.rows.completion_ids[part.rows.completion_mask] for part in parts]
        assert torch.equal(torch.cat(ids), rows.completion_ids[rows.completion_mask])


def test_rows_without_a_token_are_cut_and_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = shared()
    mask = rows.completion_mask.clone()
    mask[1:3] = False
    rows = dataclasses.replace(rows, completion_mask=mask)
    part = Batch(rows).slice(1, 3)
    assert part.rows.completion_ids.shape == (2, 1)
    assert not Scorer(tiny())(part.rows).logprobs.any()
    monkeypatch.setattr(gpt2, "MANY_WEIGHTS", 1)  # inference on few rows has a product of its own: here on none
    with torch.no_grad():
        assert not Scorer(tiny())(part.rows).logprobs.any()
