"""The sum of rewards: weights, None, and everything that a reward can do wrong."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlft.core.errors import ConfigError, DataError, RewardError
from rlft.rewards.compose import RewardSum


def give(*values: Any) -> Callable:
    return lambda **kwargs: list(values)


def summed(rewards: dict[str, Callable], weights: dict[str, float] | None = None, timeout: float = 10.0) -> RewardSum:
    return RewardSum(rewards, weights=weights or dict.fromkeys(rewards, 1.0), timeouts=dict.fromkeys(rewards, timeout))


def run(total: RewardSum, num_rows: int, **columns: list) -> Any:
    return total(
        prompts=[f"p{i}" for i in range(num_rows)],
        completions=[f"c{i}" for i in range(num_rows)],
        completion_ids=[[i] for i in range(num_rows)],
        columns=columns,
    )


def test_the_total_is_the_weighted_sum_and_the_components_come_before_the_weights() -> None:
    out = run(summed({"a": give(1.0, 2), "b": give(-0.5, True)}, {"b": 2.0, "a": 0.5}), 2)
    assert out.total.tolist() == [0.5 - 1.0, 1.0 + 2.0]
    assert out.total.dtype == torch.float32
    assert {name: values.tolist() for name, values in out.components.items()} == {"a": [1.0, 2.0], "b": [-0.5, 1.0]}
    assert list(out.components) == ["a", "b"]


def test_none_is_not_counted_and_a_row_without_any_reward_is_nan() -> None:
    out = run(summed({"a": give(1.0, None, None), "b": give(None, 3.0, None)}, {"a": 2.0, "b": 1.0}), 3)
    assert out.total[:2].tolist() == [2.0, 3.0]
    assert math.isnan(out.total[2])
    assert out.components["a"].isnan().tolist() == [False, True, True]
    assert out.components["b"].isnan().tolist() == [True, False, True]


def test_a_reward_of_weight_zero_is_shown_and_decides_nothing() -> None:
    out = run(summed({"main": give(1.0, None), "watched": give(5.0, 5.0)}, {"main": 1.0, "watched": 0.0}), 2)
    assert out.total[0] == 1.0
    assert math.isnan(out.total[1])
    assert out.components["watched"].tolist() == [5.0, 5.0]


def test_all_weights_zero_give_zero() -> None:
    assert run(summed({"a": give(1.0, 2.0)}, {"a": 0.0}), 2).total.tolist() == [0.0, 0.0]


def test_the_sum_is_taken_in_float64() -> None:
    out = run(summed({"a": give(2.0**24 + 1), "b": give(-(2.0**24))}), 1)  # 2^24 + 1 is not a float32 number
    assert out.total.tolist() == [1.0]


@pytest.mark.parametrize(
    "returned",
    [
        (0.5, 1.0),
        np.array([0.5, 1.0], dtype=np.float32),
        torch.tensor([0.5, 1.0]),
        [np.float32(0.5), np.bool_(True)],
        [torch.tensor(0.5), np.int64(1)],
    ],
)
def test_tuples_arrays_and_tensors_of_numbers_are_taken(returned: Any) -> None:
    assert run(summed({"a": lambda **kwargs: returned}), 2).total.tolist() == [0.5, 1.0]


def test_no_completions_call_no_reward() -> None:
    def reward(**kwargs: Any) -> list:
        raise AssertionError("called")

    out = run(summed({"a": reward}), 0)
    assert out.total.shape == (0,)
    assert out.components["a"].shape == (0,)


def test_a_column_of_the_data_reaches_every_reward_by_its_name() -> None:
    def matches(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def rest(**kwargs: Any) -> list[float]:
        assert sorted(kwargs) == ["answer", "completion_ids", "completions", "level", "prompts"]
        assert kwargs["prompts"] == ["p0", "p1"]
        assert kwargs["completion_ids"] == [[0], [1]]
        return [float(x) for x in kwargs["level"]]

    out = run(summed({"matches": matches, "rest": rest}), 2, answer=["c0", "x"], level=[3, 4])
    assert out.components["matches"].tolist() == [1.0, 0.0]
    assert out.components["rest"].tolist() == [3.0, 4.0]


def test_a_reward_that_edits_its_lists_changes_nothing_for_the_next_one() -> None:
    def vandal(prompts: list, completions: list, completion_ids: list, answer: list, **kwargs: Any) -> list[float]:
        completion_ids[0].append(9)
        for values in (prompts, completions, completion_ids, answer):
            values.reverse()
        return [0.0, 0.0]

    def reads(prompts: list, completions: list, completion_ids: list, answer: list, **kwargs: Any) -> list[float]:
        assert (prompts, completions, completion_ids, answer) == (["p0", "p1"], ["c0", "c1"], [[0], [1]], ["x", "y"])
        return [1.0, 1.0]

    assert run(summed({"vandal": vandal, "reads": reads}), 2, answer=["x", "y"]).total.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'mine' returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "'mine' returned 3 values for 2 completions"),
        (None, "'mine' returned a NoneType"),
        (1.0, "'mine' returned a float"),
        ({"a": 1.0, "b": 2.0}, "'mine' returned a dict"),
        ([1.0, math.nan], r"'mine' gave row 1 nan.*return None.*'c1'"),
        ([math.inf, 1.0], r"'mine' gave row 0 inf.*'c0'"),
        ([1.0, -math.inf], "'mine' gave row 1 -inf"),
        ([1.0, 10**400], "'mine' gave row 1 1000"),
        ([1.0, 1e39], r"'mine' gave row 1 1e\+39"),
        ([1.0, "2.0"], "'mine' gave row 1 '2.0'"),
        ([1.0, [0.5]], r"'mine' gave row 1 \[0.5\]"),
        ([1.0, 1j], "'mine' gave row 1 1j"),
        (torch.tensor([1.0, math.nan]), "'mine' gave row 1 nan"),
    ],
)
def test_what_is_not_a_reward_is_refused_with_the_reward_and_the_row(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        run(summed({"good": give(0.0, 0.0), "mine": lambda **kwargs: returned}), 2)


def test_an_exception_in_a_reward_names_the_reward_the_cause_and_the_line() -> None:
    def broken(**kwargs: Any) -> list[float]:
        return [1 / 0]

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"'mine' raised ZeroDivisionError: .*test_compose\.py:{line}\)") as caught:
        run(summed({"mine": broken}), 1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.exit_code == 4


def test_a_missing_argument_is_told_with_the_keywords_that_are_given() -> None:
    def wants(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
        return [0.0]

    with pytest.raises(RewardError, match=r"solution.*prompts, completions, completion_ids, answer.*\*\*kwargs"):
        run(summed({"mine": wants}), 1, answer=["x"])


def test_a_timeout_error_of_the_rewards_own_is_not_taken_for_ours() -> None:
    def fetches(**kwargs: Any) -> list[float]:
        raise TimeoutError("the judge did not answer")

    with pytest.raises(RewardError, match="'mine' raised TimeoutError: the judge did not answer"):
        run(summed({"mine": fetches}), 1)


def test_a_reward_that_exits_ends_as_a_reward_error() -> None:
    with pytest.raises(RewardError, match="'mine' raised SystemExit: 3"):
        run(summed({"mine": lambda **kwargs: sys.exit(3)}), 1)


def test_a_reward_that_hangs_is_left_behind_after_its_timeout() -> None:
    release = threading.Event()

    def hangs(**kwargs: Any) -> list[float]:
        release.wait(30)
        return [0.0]

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'slow' took longer than 0\.05 s .*cannot be killed.*reward\.slow\.timeout"):
        run(RewardSum({"slow": hangs}, weights={"slow": 1.0}, timeouts={"slow": 0.05}), 1)
    assert time.monotonic() - start < 10
    left = [thread for thread in threading.enumerate() if thread.name == "reward slow"]
    assert [thread.daemon for thread in left] == [True]  # the process can end although it still runs
    release.set()
    left[0].join(10)
    assert not left[0].is_alive()


def test_each_reward_has_its_own_timeout() -> None:
    def naps(**kwargs: Any) -> list[float]:
        time.sleep(0.2)
        return [1.0]

    both = RewardSum({"a": naps, "b": give(1.0)}, weights={"a": 1, "b": 1}, timeouts={"a": 30, "b": 0.1})
    assert run(both, 1).total.tolist() == [2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {}, "weights": {}, "timeouts": {}}, "reward=sentiment"),
        ({"rewards": {"a": 3}}, r"reward\.a is a int"),
        ({"weights": {}}, r"set reward\.a\.weight"),
        ({"weights": {"a": 1.0, "aa": 1.0}}, r"'aa'.*did you mean 'a'"),
        ({"weights": {"a": math.nan}}, r"reward\.a\.weight=nan"),
        ({"weights": {"a": "1"}}, r"reward\.a\.weight='1'"),
        ({"timeouts": {}}, r"set reward\.a\.timeout"),
        ({"timeouts": {"a": 0}}, r"reward\.a\.timeout=0 "),
        ({"timeouts": {"a": None}}, r"reward\.a\.timeout=None"),
        ({"timeouts": {"a": math.inf}}, r"reward\.a\.timeout=inf"),
        ({"timeouts": {"a": math.nan}}, r"reward\.a\.timeout=nan"),
    ],
)
def test_a_wrong_argument_is_refused_in_the_constructor(changes: dict, message: str) -> None:
    arguments: dict[str, Any] = {"rewards": {"a": give(1.0)}, "weights": {"a": 1.0}, "timeouts": {"a": 1.0}}
    arguments.update(changes)
    with pytest.raises(ConfigError, match=message):
        RewardSum(arguments["rewards"], weights=arguments["weights"], timeouts=arguments["timeouts"])


def test_a_column_with_a_rewards_own_keyword_is_refused() -> None:
    with pytest.raises(DataError, match=r"'completions'.*rename"):
        run(summed({"a": give(1.0)}), 1, completions=["x"])


def test_lists_of_unequal_length_are_the_callers_error() -> None:
    with pytest.raises(ValueError, match="answer has 2 values for 1 completions"):
        run(summed({"a": give(1.0)}), 1, answer=["x", "y"])
