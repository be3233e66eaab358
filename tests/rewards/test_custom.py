"""A user's function with TRL's signature works unchanged, from a module or a file; others are refused at once."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from rlft.core.errors import ConfigError, RewardError
from rlft.rewards.compose import RewardSum
from rlft.rewards.custom import Custom

SOURCE = """
from dataclasses import dataclass

@dataclass
class Scorer:
    best: int = 4

def reward(completions, **kwargs):
    return [float(len(c)) for c in completions]

def with_column(prompts, completions, answer, **kwargs):
    return [1.0 if a in c else None for a, c in zip(answer, completions)]

async def awaited(completions, **kwargs):
    return [2.0 for _ in completions]

def broken(completions, **kwargs):
    raise KeyError("no such thing")

def closed(completions):
    return [0.0 for _ in completions]

def positional(completions, /, **kwargs):
    return [0.0 for _ in completions]

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards_file.py"
    path.write_text(SOURCE)
    return path


def run(reward: Any, completions: list[str], **columns: list) -> list[float]:
    total = RewardSum({"custom": reward}, weights={"custom": 1.0}, timeouts={"custom": 10.0})
    size = len(completions)
    out = total(prompts=["p"] * size, completions=completions, completion_ids=[[1]] * size, columns=columns)
    return out.total.tolist()


def test_a_function_in_trls_signature_drops_in_from_a_file(file: Path) -> None:
    assert run(Custom(f"{file}:reward"), ["", "ab"], label=[0, 1]) == [0.0, 2.0]


def test_a_function_drops_in_from_a_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    try:
        assert run(Custom("my_rewards_file:reward"), ["abc"]) == [3.0]
    finally:
        sys.modules.pop("my_rewards_file", None)


def test_a_path_is_relative_to_where_the_run_was_started(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert run(Custom("my_rewards_file.py:reward"), ["abc"]) == [3.0]


def test_a_column_reaches_the_function_and_none_is_not_counted(file: Path) -> None:
    first, second = run(Custom(f"{file}:with_column"), ["it is 4", "it is 5"], answer=["4", "4"])
    assert first == 1.0
    assert math.isnan(second)


def test_an_async_function_is_awaited(file: Path) -> None:
    assert run(Custom(f"{file}:awaited"), ["a", "b"]) == [2.0, 2.0]


def test_an_exception_in_the_function_names_the_reward_and_the_line_in_the_users_file(file: Path) -> None:
    line = SOURCE.splitlines().index('    raise KeyError("no such thing")') + 1
    with pytest.raises(RewardError, match=rf"'custom' raised KeyError: 'no such thing' \(in {file}:{line}\)"):
        run(Custom(f"{file}:broken"), ["a"])


def test_a_column_that_the_data_lacks_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"'custom': the function needs a column 'answer'; .* the data has label"):
        run(Custom(f"{file}:with_column"), ["a"], label=[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewrad", r"names no function.*did you mean 'reward'"),
        ("number", r"is a int, not a function"),
        ("Scorer", r"is a class.*conf/reward/<name>\.yaml"),
        ("closed", r"prompts.*\*\*kwargs"),
        ("positional", r"completions.*\*\*kwargs"),
        ("", r"must be package\.module:function"),
    ],
)
def test_what_cannot_be_called_is_refused_in_the_constructor(file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Custom(f"{file}:{name}")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_colon", "must be package.module:function"),
        (None, "must be package.module:function"),
        ("nowhere.py:reward", "there is no .*nowhere.py"),
        ("no_such_module_here:reward", "ModuleNotFoundError.*PYTHONPATH"),
    ],
)
def test_a_wrong_place_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Custom(function)


def test_a_file_that_does_not_run_is_refused_with_its_error(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text("def reward(")
    with pytest.raises(ConfigError, match=r"half\.py:reward.*SyntaxError"):
        Custom(f"{path}:reward")
    assert "rlft_custom_half" not in sys.modules
