"""TRL's own reward functions work unchanged, from its lazy modules, with completions as strings or as messages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlft.algos.samples import Samples
from rlft.core.errors import ConfigError, RewardError
from rlft.data.prompts import PromptData
from rlft.data.source import Row
from rlft.rewards.compose import RewardSum
from rlft.rewards.custom import Custom
from tests.algos.offline.builders import Memory
from tests.builders import TOKENIZER

LAZY = """
import sys

def given(prompts, completions, **kwargs):
    given.seen = prompts, completions
    return [0.0] * len(completions)

def __getattr__(name):
    if name == "late":
        return lambda completions, **kwargs: [1.0] * len(completions)
    if name == "broken":
        raise ImportError("needs a package")
    raise AttributeError(name)

def __dir__():
    return ["given", "late", "broken", "sys"]
"""


@pytest.fixture
def lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lazy_rewards.py").write_text(LAZY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "lazy_rewards"
    sys.modules.pop("lazy_rewards", None)


def run(reward: Any, completions: list[str], *, messages: list | None = None, **columns: list) -> list[float]:
    total = RewardSum({"custom": reward}, weights={"custom": 1.0}, timeouts={"custom": 60.0})
    size = len(completions)
    ids = [[1] * len(text) for text in completions]
    return total(
        prompts=["p"] * size, completions=completions, completion_ids=ids, columns=columns, messages=messages
    ).total.tolist()


def test_a_function_of_a_lazy_module_is_found_and_a_name_that_it_lacks_is_not(lazy: str) -> None:
    assert run(Custom(f"{lazy}:late"), ["a", "b"]) == [1.0, 1.0]
    with pytest.raises(ConfigError, match=r"lazy_rewards has broken, given, late \(did you mean 'late'\?\)"):
        Custom(f"{lazy}:lat")
    with pytest.raises(ConfigError, match="could not be imported: ImportError: needs a package"):
        Custom(f"{lazy}:broken")


def test_messages_are_handed_over_as_trl_does_and_strings_without_the_setting(lazy: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for setting in (True, False):
        reward = Custom(f"{lazy}:given", messages=setting)
        run(reward, ["a", "b"], messages=[tuple(chat), None])
        prompts, completions = reward.function.seen
        if setting:
            assert prompts == [chat, [{"role": "user", "content": "p"}]]
            assert completions == [[{"role": "assistant", "content": text}] for text in "ab"]
        else:
            assert (prompts, completions) == (["p", "p"], ["a", "b"])


def test_the_conversation_of_a_data_set_reaches_the_function(lazy: str) -> None:
    chat = ({"role": "user", "content": "abc"},)
    data = PromptData(Memory([Row("abc", {}, "a:1", chat), Row("def", {}, "a:2")]), tokenizer=TOKENIZER)
    prompts = data.prompts("train")
    assert [prompt.messages for prompt in prompts] == [chat, None]
    reward = Custom(f"{lazy}:given", messages=True)
    rewards = RewardSum({"custom": reward}, weights={"custom": 1.0}, timeouts={"custom": 60.0})
    rollout: Any = SimpleNamespace(completions=lambda: [[0], [1]])
    Samples(list(prompts), rollout, ["a", "b"], group_size=1).score(rewards)
    assert reward.function.seen[0] == [list(chat), [{"role": "user", "content": "def"}]]
    assert reward.function.seen[1][1] == [{"role": "assistant", "content": "b"}]


def test_trls_format_reward_reads_messages_and_says_so_where_strings_are_handed_over() -> None:
    pytest.importorskip("trl")
    texts = ["<think>so</think> 4", "4"]
    assert run(Custom("trl.rewards:think_format_reward", messages=True), texts) == [1.0, 0.0]
    with pytest.raises(RewardError, match=r"handed over as strings; reward\.custom\.messages=true makes them lists"):
        run(Custom("trl.rewards:think_format_reward"), texts)


def test_trls_accuracy_reward_reads_a_column_and_names_it_where_the_data_lacks_it() -> None:
    pytest.importorskip("trl")
    reward = Custom("trl.rewards:accuracy_reward", messages=True)
    with pytest.raises(ConfigError, match=r"reward 'custom': .*needs a column 'solution'.*the data has solutions"):
        run(reward, ["4"], solutions=["4"])
    pytest.importorskip("math_verify")
    assert run(reward, [r"\boxed{4}", r"\boxed{5}"], solution=["$4$", "$4$"]) == [1.0, 0.0]


def test_trls_makers_of_rewards_are_called_in_a_file_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    for name in ("get_soft_overlong_punishment", "get_repetition_penalty_reward"):
        with pytest.raises(ConfigError, match=rf"as in score = {name}\(…\), and name that: FILE\.py:score"):
            Custom(f"trl.rewards:{name}")
    path = tmp_path / "made.py"
    path.write_text(
        "from trl.rewards import get_soft_overlong_punishment\nscore = get_soft_overlong_punishment(10, 4)\n"
    )
    # A character is a token: none, two, and all of the four tokens of the buffer are used.
    assert run(Custom(f"{path}:score"), ["a" * 6, "a" * 8, "a" * 10]) == pytest.approx([0.0, -0.5, -1.0])


@pytest.mark.parametrize("kind", [ConfigError, RewardError])
def test_what_a_reward_says_of_settings_keeps_its_exit_code(kind: type) -> None:
    def reward(**_: Any) -> list[float]:
        raise kind("no such column")

    with pytest.raises(kind, match="reward 'custom': no such column") as refused:
        run(reward, ["a"])
    assert type(refused.value) is kind


def test_nothing_but_a_reward_that_names_them_gets_the_conversations() -> None:
    seen: dict[str, Any] = {}

    def reward(completions: list[str], **keywords: Any) -> list[float]:
        seen.update(keywords)
        return [0.0] * len(completions)

    assert torch.tensor(run(reward, ["a"], messages=[({"role": "user", "content": "x"},)])).tolist() == [0.0]
    assert sorted(seen) == ["completion_ids", "prompts"]
