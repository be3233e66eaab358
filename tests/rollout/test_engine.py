from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlft.models.gpt2 import GPT2
from rlft.models.kv.copied import DecodeCache
from rlft.models.kv.shared import SharedDecodeCache
from rlft.models.scorer import Scorer
from rlft.rollout import batching
from rlft.rollout.engine import Rollout, generate
from rlft.rollout.sampling import Sampling, uniforms
from tests.models.tiny import logits_of, plain_logprobs, random_ids, tiny

PROMPTS = random_ids(1, [3, 1, 7, 12, 3])
EOS = 4
GROUP = 4


@pytest.fixture(params=[True, False], ids=["packed", "padded"], autouse=True)
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for a policy that leaves attention to its cache and for one that does not."""
    monkeypatch.setattr(GPT2, "takes_packed", request.param)


def rollout(policy: GPT2, prompts: list[list[int]] = PROMPTS, **changed: Any) -> Rollout:
    settings: dict[str, Any] = {"group_size": GROUP, "sampling": Sampling(10), "eos_id": EOS, "seed": 5, "step": 2}
    return generate(policy, prompts, **(settings | changed))


def naive(
    policy: GPT2, number: int, member: int, sampling: Sampling, eos_id: int | None
) -> tuple[list[int], list[float], str]:
    """One completion of PROMPTS[number], by a whole plain forward and a loop over the vocabulary for each token."""
    draws = uniforms(seed=5, stream="rollout", step=2, prompts=[number], members=[member], num_tokens=30)[0]
    ids, logprobs = list(PROMPTS[number]), []
    while len(logprobs) < sampling.max_new_tokens and len(ids) < policy.context_length:
        logits = logits_of(policy, torch.tensor([ids]))[0, -1].detach() / sampling.temperature
        if eos_id is not None and len(logprobs) < sampling.min_new_tokens:
            logits[eos_id] = -torch.inf
        probabilities, cumulative = logits.softmax(-1).tolist(), 0.0
        token = max(range(len(probabilities)), key=probabilities.__getitem__)
        if not sampling.greedy:
            for token, probability in enumerate(probabilities):  # noqa: B007
                cumulative += probability
                if cumulative > draws[len(logprobs)]:
                    break
        ids.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        if token == eos_id:
            return ids[len(PROMPTS[number]) :], logprobs, "stop"
    return ids[len(PROMPTS[number]) :], logprobs, "length"


@pytest.mark.parametrize(
    ("sampling", "eos_id", "reasons"),
    [
        (Sampling(10), EOS, ("length", "stop")),
        (Sampling(10, temperature=0.6), EOS, ("length", "stop")),
        (Sampling(10, temperature=1.7, min_new_tokens=4), EOS, ("length", "stop")),
        (Sampling(10, greedy=True), EOS, ("length", "stop")),
        (Sampling(10, greedy=True, min_new_tokens=3), EOS, ("length", "stop")),
        (Sampling(10, min_new_tokens=4), None, ("length",)),
        (Sampling(1), EOS, ("length", "stop")),
        (Sampling(50), EOS, ("length", "stop")),  # rows reach the end of the context at different lengths
        (Sampling(50), None, ("length",)),
    ],
    ids=str,
)
def test_a_rollout_equals_a_naive_loop(sampling: Sampling, eos_id: int | None, reasons: tuple[str, ...]) -> None:
    policy = tiny(2, n_positions=16)
    result = rollout(policy, sampling=sampling, eos_id=eos_id)
    for row, completion in enumerate(result.completions()):
        ids, logprobs, reason = naive(policy, row // GROUP, row % GROUP, sampling, eos_id)
        assert completion == ids
        assert result.finish_reasons[row] == reason
        got = result.logprobs[row, : len(ids)]
        torch.testing.assert_close(got, torch.tensor(logprobs, dtype=torch.float64), rtol=0, atol=1e-12)
    assert sorted(set(result.finish_reasons)) == list(reasons)


def test_the_end_token_counts_and_what_follows_does_not() -> None:
    result = rollout(tiny(), sampling=Sampling(10))
    rows, lengths = result.rows, result.rows.completion_mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 3
    for row, length in enumerate(lengths.tolist()):
        ids = rows.completion_ids[row].tolist()
        assert rows.completion_mask[row].tolist() == [t < length for t in range(len(ids))]
        assert EOS not in ids[: length - 1]
        assert (ids[length - 1] == EOS) == (result.finish_reasons[row] == "stop")
        assert not any(ids[length:]) and not result.logprobs[row, length:].any()
        assert length == 10 or result.finish_reasons[row] == "stop"
    assert rows.completion_ids.shape[1] == int(lengths.max())
    assert rows.prompt_lengths.tolist() == [len(p) for p in PROMPTS]
    assert rows.prompt_of_row.tolist() == [p for p in range(5) for _ in range(GROUP)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_samplers_logprobs_are_those_of_a_plain_forward_and_of_the_scorer(
    dtype: torch.dtype, bound: float, temperature: float
) -> None:
    policy = tiny(dtype=dtype, n_layer=3, n_embd=32).requires_grad_(False)
    result = rollout(policy, sampling=Sampling(20, temperature=temperature))
    scores = Scorer(policy)(result.rows, temperature=temperature)
    assert result.logprobs.dtype == dtype
    assert float((scores.logprobs - result.logprobs).abs().max()) < bound
    for row, completion in enumerate(result.completions()):
        expected = plain_logprobs(policy, PROMPTS[row // GROUP], completion, temperature=temperature)
        assert float((result.logprobs[row, : len(completion)] - expected).abs().max()) < bound


def test_tokens_do_not_depend_on_batch_size_order_group_or_padding() -> None:
    policy = tiny()
    whole = rollout(policy)
    expected = [whole.completions()[p * GROUP : (p + 1) * GROUP] for p in range(len(PROMPTS))]
    assert len({str(group) for group in expected}) == len(PROMPTS)
    assert whole.completions() == rollout(policy).completions()
    for p, prompt in enumerate(PROMPTS):  # alone, without the padding that longer prompts bring, and in other groups
        for group_size in (1, 2, GROUP, 9):
            alone = rollout(policy, [prompt], first_prompt=p, group_size=group_size)
            assert alone.completions()[:GROUP] == expected[p][:group_size]
        logprobs = rollout(policy, [prompt], first_prompt=p).logprobs
        together = whole.logprobs[p * GROUP : (p + 1) * GROUP, : logprobs.shape[1]]
        torch.testing.assert_close(logprobs, together, rtol=0, atol=1e-12)
    for start, stop in [(0, 2), (2, 5), (1, 4)]:
        part = rollout(policy, PROMPTS[start:stop], first_prompt=start).completions()
        assert part == [ids for group in expected[start:stop] for ids in group]
    beside = rollout(policy, [*PROMPTS, random_ids(3, [23])[0], *PROMPTS])  # a neighbour with room for a single token
    assert beside.completions()[: 5 * GROUP] == whole.completions()


def test_identity_of_a_sample() -> None:
    policy = tiny()
    first = rollout(policy).completions()
    for changed in ({"seed": 6}, {"step": 3}, {"stream": "evaluation"}, {"first_prompt": 1}):
        assert rollout(policy, **changed).completions() != first, changed
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert rollout(policy).completions() == first
    assert torch.equal(torch.get_rng_state(), before)


def test_more_room_changes_no_earlier_token() -> None:
    policy = tiny()
    long = rollout(policy, sampling=Sampling(12)).completions()
    for max_new_tokens in (1, 5, 11):
        short = rollout(policy, sampling=Sampling(max_new_tokens)).completions()
        assert short == [ids[:max_new_tokens] for ids in long]


@pytest.mark.parametrize("greedy", [False, True])
def test_compaction_changes_nothing(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = tiny(), []
    cache_type = SharedDecodeCache if policy.takes_packed else DecodeCache
    compact = cache_type.compact

    def counted(cache: DecodeCache | SharedDecodeCache, rows: torch.Tensor) -> None:
        calls.append(len(rows))
        compact(cache, rows)
        assert {len(k) for k in cache.keys + cache.values} == {len(rows)}

    monkeypatch.setattr(cache_type, "compact", counted)
    results, num_calls = [], []
    for fraction in (0.0, batching.KEEP_FRACTION, 1.1):
        monkeypatch.setattr(batching, "KEEP_FRACTION", fraction)
        calls.clear()
        results.append(rollout(policy, sampling=Sampling(15, greedy=greedy)))
        num_calls.append(len(calls))
    assert num_calls[0] == 0 < num_calls[1] < num_calls[2]
    for other in results[1:]:
        assert other.completions() == results[0].completions()
        assert other.finish_reasons == results[0].finish_reasons
        assert torch.equal(other.rows.completion_mask, results[0].rows.completion_mask)
        torch.testing.assert_close(other.logprobs, results[0].logprobs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_rows", [1, 3, 5, 8, 20])
@pytest.mark.parametrize("eos_id", [EOS, None])
def test_rows_that_join_as_others_end_draw_the_same_tokens(max_rows: int, eos_id: int | None) -> None:
    policy = tiny()
    at_once = rollout(policy, sampling=Sampling(12), eos_id=eos_id)
    seen = []
    policy.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    in_turn = rollout(policy, sampling=Sampling(12, max_rows=max_rows), eos_id=eos_id)
    assert in_turn.completions() == at_once.completions()
    assert in_turn.finish_reasons == at_once.finish_reasons
    torch.testing.assert_close(in_turn.logprobs, at_once.logprobs, rtol=0, atol=1e-12)
    decoded = [rows for rows, tokens in seen if tokens == 1 and rows > 1] or [1]
    assert max(decoded) <= max_rows


def test_joining_keeps_the_rows_busy() -> None:
    """Fewer steps than one unit after the other would take, as rows end at different times."""
    policy, steps = tiny(), []
    policy.register_forward_pre_hook(lambda _, args: steps.append(args[0].shape[1]))
    rollout(policy, sampling=Sampling(15, max_rows=2 * GROUP))
    num_joined = sum(tokens == 1 for tokens in steps)
    steps.clear()
    for number, prompt in enumerate(PROMPTS):
        rollout(policy, [prompt], sampling=Sampling(15), first_prompt=number)
    assert num_joined < 0.7 * sum(tokens == 1 for tokens in steps)


def test_greedy_equals_transformers_generate(tmp_path: Path) -> None:
    policy = tiny(2, dtype=torch.float32, n_positions=16)
    policy.save_hf(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = rollout(policy, group_size=1, sampling=Sampling(9, greedy=True)).completions()
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": min(9, 16 - len(prompt)), "eos_token_id": EOS, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        assert completion == expected[0, len(prompt) :].tolist()
    assert [len(completion) for completion in ours] == [4, 9, 9, 3, 9]  # two of them drew the end token


def test_greedy_members_of_a_group_are_the_same() -> None:
    completions = rollout(tiny(), sampling=Sampling(10, greedy=True)).completions()
    for p in range(len(PROMPTS)):
        assert all(ids == completions[p * GROUP] for ids in completions[p * GROUP : (p + 1) * GROUP])


def test_top_k_and_top_p_restrict_what_is_drawn() -> None:
    policy = tiny().requires_grad_(False)
    greedy = rollout(policy, sampling=Sampling(10, greedy=True)).completions()
    for bent in (Sampling(10, top_k=1), Sampling(10, top_p=1e-6)):
        result = rollout(policy, sampling=bent)
        assert result.completions() == greedy
        assert not result.logprobs.any()  # the one token that is left has probability 1
    result = rollout(policy, sampling=Sampling(10, top_k=3))
    for row, completion in enumerate(result.completions()):
        prompt = PROMPTS[row // GROUP]
        logits = logits_of(policy, torch.tensor([prompt + completion[:-1]]))[0, len(prompt) - 1 :]
        top = logits.topk(3)
        for t, token in enumerate(completion):
            place = top.indices[t].tolist().index(token)
            assert float(result.logprobs[row, t] - top.values[t].log_softmax(-1)[place]) == pytest.approx(0, abs=1e-12)


def test_the_end_of_the_context_ends_a_row_for_length() -> None:
    policy = tiny(n_positions=13)
    result = rollout(policy, sampling=Sampling(50), eos_id=None)
    assert result.rows.completion_mask.sum(dim=1).tolist() == [13 - len(p) for p in PROMPTS for _ in range(GROUP)]
    assert set(result.finish_reasons) == {"length"}
    assert all(0 <= token < 19 for ids in result.completions() for token in ids)


def test_dropout_is_off_and_the_mode_is_as_before() -> None:
    dropping = tiny(dropout=0.5)
    for mode in (True, False):
        result = rollout(dropping.train(mode))
        assert dropping.training is mode and dropping.h[0].training is mode
        assert result.completions() == rollout(tiny()).completions()
        assert not result.logprobs.requires_grad


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts were given"),
        ([[1], []], "prompt 1 is empty: start it with the end-of-text token"),
        ([[1], [2] * 24], "prompt 1 has 24 tokens, which leaves no room in a context of 24"),
        ([[2] * 30], "prompt 0 has 30 tokens"),
    ],
    ids=["none", "empty", "full", "longer"],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollout(tiny(), prompts)


def test_a_prompt_may_leave_room_for_one_token() -> None:
    result = rollout(tiny(), [[2] * 23])
    assert [len(ids) for ids in result.completions()] == [1] * GROUP
