"""Token-level rewards in the sum, and two of the package's rewards: next_token and overlong."""

from __future__ import annotations

import pytest
import torch

from rlft.core.errors import ConfigError, RewardError
from rlft.rewards.compose import RewardSum
from rlft.rewards.next_token import NextToken
from rlft.rewards.overlong import Overlong


def summed(**rewards):
    weights = {name: float(i + 1) for i, name in enumerate(rewards)}  # 1, 2, …
    return RewardSum(rewards, weights=weights, timeouts=dict.fromkeys(rewards, 10.0))


def run(total, ids, **columns):
    return total(prompts=["p"] * len(ids), completions=["c"] * len(ids), completion_ids=ids, columns=columns)


IDS = [[4, 5, 6], [7]]


def test_token_level_rewards_add_up_with_plain_ones():
    out = run(
        summed(
            plain=lambda **_: [10.0, 20.0],
            dense=lambda **_: [[1.0, 0.0, 2.0], [3.0]],
            more=lambda **_: [[1, 1, 1], [0]],
        ),
        IDS,
    )
    assert out.tokens == [[5.0, 3.0, 7.0], [6.0]]  # 2 x dense + 3 x more
    assert out.components["dense"].tolist() == [3.0, 3.0]
    assert out.total.tolist() == [10 + 6 + 9, 20 + 6]


def test_without_a_token_level_reward_there_are_no_token_rewards():
    assert run(summed(plain=lambda **_: [1.0, 2.0]), IDS).tokens is None


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[1.0, 2.0], [3.0]], "row 0 2 values for its 3 tokens"),
        ([[1.0, 2.0, 3.0]], "1 lists for 2 completions"),
        ([[1.0, float("nan"), 3.0], [3.0]], "a token of row 0 nan"),
        ([[1.0, None, 3.0], [3.0]], "a token of row 0 None"),
        ([[1.0, 2.0, 3.0], 3.0], "gave row 0"),
    ],
)
def test_what_is_no_number_for_each_token_is_refused_with_its_row(returned, message):
    with pytest.raises(RewardError, match=message):
        run(summed(dense=lambda **_: returned), IDS)


def test_next_token_compares_position_by_position():
    targets = [[4, 9, 6, 8], [1]]
    assert run(summed(n=NextToken()), IDS, target_ids=targets).tokens == [[1, 0, 1], [0]]
    assert run(summed(n=NextToken(miss=-1.0)), IDS, target_ids=[[4, 9], [7]]).tokens == [[1, -1, 0], [1]]


def test_next_token_without_targets_names_the_data_that_has_them():
    with pytest.raises(ConfigError, match="data=contexts"):
        run(summed(n=NextToken()), IDS)
    with pytest.raises(ConfigError, match=r"miss=0\.5 must be at most 0"):
        NextToken(miss=0.5)


def test_overlong_is_the_papers_ramp():
    reward = Overlong(max_tokens=10, buffer=4)
    ids = [[0] * n for n in (1, 6, 7, 9, 10, 12)]
    assert reward(completion_ids=ids) == [0, 0, -0.25, -0.75, -1, -1]
    for buffer in (0, 11):
        with pytest.raises(ConfigError, match="between 1 and"):
            Overlong(max_tokens=10, buffer=buffer)


def test_float32_totals_lose_nothing_that_counts():
    out = run(summed(dense=lambda **_: [[0.1] * 3, [1e8]]), IDS)
    assert out.total.dtype == torch.float32
    assert out.total[0].item() == pytest.approx(0.3, rel=1e-6)
