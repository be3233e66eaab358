"""Completions as one object: drawn, scored, kept group by group, joined again and shown."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlft.algos.base import Run
from rlft.algos.samples import EVAL_SEED, EVAL_STREAM, Samples, draw, group_std, joined
from rlft.core.metrics import Metrics
from rlft.rewards.compose import RewardSum
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from tests.algos.micro import eighths
from tests.builders import TOKENIZER, FixedPrompts, Float64Rewards, run_of, tiny

TEXTS = ("abc", "d", "efghi", "jk")
GROUP = 3
SAMPLING = Sampling(6, 0.8)


def some_none(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float | None]:
    """The row's number, and nothing for completions of one token."""
    return [None if len(ids) == 1 else 1.0 + n for ids, n in zip(completion_ids, number, strict=True)]


def each_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[i / 8 for i in ids] for ids in completion_ids]


def reward_of(*functions: Any, weights: tuple[float, ...] = (1.0, 0.5)) -> RewardSum:
    named = {function.__name__: function for function in functions}
    return Float64Rewards(named, weights=dict(zip(named, weights, strict=False)), timeouts=dict.fromkeys(named, 60.0))


@pytest.fixture(scope="module")
def run() -> Run:
    return run_of(tiny(9, spread=0.25).double(), FixedPrompts(TEXTS), max_new_tokens=6, temperature=0.8)


@pytest.fixture(scope="module")
def drawn(run: Run) -> Samples:
    return draw(run, run.data.prompts("train"), sampling=SAMPLING, group_size=GROUP)


@pytest.fixture(scope="module")
def samples(drawn: Samples) -> Samples:
    return drawn.score(reward_of(eighths, some_none))


def assert_same(a: Samples, b: Samples) -> None:
    """Also of the same width once what is padded everywhere is cut off."""
    assert a.prompts == b.prompts and a.texts == b.texts
    assert a.rollout.completions() == b.rollout.completions()
    assert a.rollout.finish_reasons == b.rollout.finish_reasons
    assert torch.equal(a.rollout.rows.prompt_of_row, b.rollout.rows.prompt_of_row)
    width = min(a.rollout.logprobs.shape[1], b.rollout.logprobs.shape[1])
    assert torch.equal(a.rollout.logprobs[:, :width], b.rollout.logprobs[:, :width])
    assert torch.equal(a.total.nan_to_num(-1.0), b.total.nan_to_num(-1.0))
    assert a.rewards.components.keys() == b.rewards.components.keys()
    for name, values in a.rewards.components.items():
        assert torch.equal(values.nan_to_num(-1.0), b.rewards.components[name].nan_to_num(-1.0))
    assert a.rewards.tokens == b.rewards.tokens


# Drawing.


def test_what_is_drawn_is_what_the_engine_draws(run, drawn):
    ids = [prompt.ids for prompt in drawn.prompts]
    expected = generate(
        run.policy, ids, group_size=GROUP, sampling=SAMPLING, eos_id=TOKENIZER.eos_id, seed=EVAL_SEED,
        stream=EVAL_STREAM,
    )  # fmt: skip
    assert drawn.rollout.completions() == expected.completions()
    assert torch.equal(drawn.rollout.logprobs, expected.logprobs)
    assert drawn.texts == [TOKENIZER.decode(completion) for completion in expected.completions()]
    assert [prompt.text for prompt in drawn.prompt_of_row] == [text for text in TEXTS for _ in range(GROUP)]


def test_draws_of_an_evaluation_are_the_same_in_every_run_and_those_of_another_stream_are_not(run, drawn):
    prompts = run.data.prompts("train")
    other = run_of(run.policy, run.data, seed=99)
    assert draw(other, prompts, sampling=SAMPLING, group_size=GROUP).texts == drawn.texts
    for changes in ({"seed": 1}, {"stream": "rollout"}, {"step": 1}, {"first_prompt": 1}):
        assert draw(run, prompts, sampling=SAMPLING, group_size=GROUP, **changes).texts != drawn.texts


def test_a_part_of_the_prompts_has_the_draws_that_it_has_among_all(run, drawn):
    prompts = run.data.prompts("train")
    part = draw(run, prompts[2:], sampling=SAMPLING, group_size=GROUP, first_prompt=2)
    assert part.texts == drawn.texts[2 * GROUP :]


# Scoring.


def test_rewards_are_called_with_every_rows_prompt_text_ids_and_columns(drawn):
    seen: dict[str, Any] = {}

    def spy(prompts, completions, completion_ids, number, **_):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, number=number)
        return [0.0] * len(completions)

    drawn.score(reward_of(spy))
    assert seen == {
        "prompts": [text for text in TEXTS for _ in range(GROUP)],
        "completions": drawn.texts,
        "completion_ids": drawn.rollout.completions(),
        "number": [i for i in range(len(TEXTS)) for _ in range(GROUP)],
    }


def test_scoring_makes_new_samples_and_leaves_the_old_ones_as_they_were(drawn, samples):
    assert drawn.scored is None and samples.scored is not None
    assert samples.rollout is drawn.rollout and samples.prompts is drawn.prompts
    ids = samples.rollout.completions()
    numbers = [i for i in range(len(TEXTS)) for _ in range(GROUP)]
    second = [None if len(row) == 1 else 1.0 + n for row, n in zip(ids, numbers, strict=True)]
    assert any(one is None for one in second) and not all(one is None for one in second)
    expected = [first + 0.5 * (one or 0.0) for first, one in zip(eighths(ids), second, strict=True)]
    assert samples.total.tolist() == expected
    assert [None if math.isnan(x) else x for x in samples.rewards.components["some_none"].tolist()] == second


def test_a_completions_reward_stands_at_its_last_token_and_a_tokens_at_its_own(drawn):
    both = drawn.score(reward_of(eighths, each_token))
    found = both.token_rewards(dtype=torch.float64, device=torch.device("cpu"))
    for row, ids in enumerate(drawn.rollout.completions()):
        expected = [0.5 * i / 8 for i in ids] + [0.0] * (found.shape[1] - len(ids))
        expected[len(ids) - 1] += eighths(completion_ids=drawn.rollout.completions())[row]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-14)
    alone = drawn.score(reward_of(some_none)).token_rewards(dtype=torch.float32, device=torch.device("cpu"))
    totals = drawn.score(reward_of(some_none)).total
    assert alone.dtype == torch.float32 and totals.isnan().any()
    assert alone.sum(dim=1).tolist() == totals.nan_to_num(0.0).tolist()  # what no reward counts has none


# Keeping and joining groups.


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 1, 2, 3], []])
def test_kept_groups_are_the_rows_of_their_prompts(samples, kept):
    rows = [p * GROUP + i for p in kept for i in range(GROUP)]
    part = samples.keep(kept)
    assert [prompt.text for prompt in part.prompts] == [TEXTS[p] for p in kept]
    assert part.texts == [samples.texts[row] for row in rows]
    assert part.rollout.completions() == [samples.rollout.completions()[row] for row in rows]
    assert part.total.tolist() == pytest.approx(samples.total[rows].tolist(), nan_ok=True)
    components = part.rewards.components
    assert components["eighths"].tolist() == samples.rewards.components["eighths"][rows].tolist()
    assert part.rollout.rows.prompt_of_row.tolist() == [i for i in range(len(kept)) for _ in range(GROUP)]


@pytest.mark.parametrize("functions", [(eighths, some_none), (eighths, each_token)])
def test_groups_that_are_taken_apart_and_joined_are_what_they_were(drawn, functions):
    whole = drawn.score(reward_of(*functions))
    assert_same(joined([whole.keep([0, 1]), whole.keep([2]), whole.keep([3])]), whole)
    assert_same(joined([whole.keep([1]), whole.keep([3])]), whole.keep([1, 3]))
    assert (whole.rewards.tokens is None) == (each_token not in functions)


def test_joined_samples_of_other_draws_are_padded_to_the_longest(run, samples):
    short = draw(run, run.data.prompts("train")[:1], sampling=Sampling(2, 0.8), group_size=GROUP)
    both = joined([short.score(reward_of(eighths, some_none)), samples])
    assert both.rollout.completions() == short.rollout.completions() + samples.rollout.completions()
    assert both.rollout.rows.prompt_of_row.tolist() == [i for i in range(5) for _ in range(GROUP)]
    assert both.texts == short.texts + samples.texts and both.group_size == GROUP


# What is shown and logged.


def test_rows_show_the_completions_and_once_scored_what_the_rewards_say(drawn, samples):
    plain = [{"prompt": p.text, "completion": t} for p, t in zip(drawn.prompt_of_row, drawn.texts, strict=True)]
    assert drawn.rows() == plain and drawn.rows(2) == plain[:2] and drawn.rows(0) == []
    row = samples.rows()[4]
    assert row == plain[4] | {
        "reward": float(samples.total[4]),
        "rewards": {name: pytest.approx(float(v[4]), nan_ok=True) for name, v in samples.rewards.components.items()},
        "finish_reason": samples.rollout.finish_reasons[4],
    }
    assert len(samples.rows()) == len(TEXTS) * GROUP
    assert [r["completion"] for r in samples.rows(5)] == samples.texts[:5]


def test_rewards_that_are_logged_are_means_over_the_completions_that_each_counts(samples):
    metrics = Metrics()
    samples.add_rewards(metrics, prefix="eval/")
    counted = [x for x in samples.rewards.components["some_none"].tolist() if not math.isnan(x)]
    assert metrics.local() == pytest.approx({
        "eval/reward": sum(samples.total.tolist()) / 12,
        "eval/rewards/eighths/mean": sum(samples.rewards.components["eighths"].tolist()) / 12,
        "eval/rewards/some_none/mean": sum(counted) / len(counted),
    })  # fmt: skip


def test_a_group_of_one_has_no_spread_to_log(run):
    for group_size, names in ((1, set()), (2, {"reward_std", "frac_reward_zero_std"})):
        metrics = Metrics()
        drawn = draw(run, run.data.prompts("train"), sampling=SAMPLING, group_size=group_size)
        drawn.score(reward_of(eighths)).add_rollout(metrics)
        assert metrics.local().keys() & {"reward_std", "frac_reward_zero_std"} == names


def test_the_spread_of_a_group_leaves_out_what_is_not_counted():
    nan = math.nan
    rewards = torch.tensor([1.0, 3.0, 5.0, 0.5, 0.5, 0.5, 2.0, nan, 4.0, nan, 7.0, nan], dtype=torch.float64)
    expected = [2.0, 0.0, math.sqrt(2.0), 0.0]  # ddof 1: of (1, 3, 5), of equals, of (2, 4), of one alone
    assert group_std(rewards, group_size=3).tolist() == pytest.approx(expected, rel=1e-14)
