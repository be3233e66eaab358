"""The text environment: Gymnasium's own checks, and the same episodes and returns as the rollout's."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from rlft.algos.samples import draw
from rlft.core.errors import ConfigError, DataError
from rlft.core.rng import order
from rlft.data.prompts import PromptData
from rlft.data.source import Row
from rlft.envs.text_env import TextEnv
from rlft.rewards.compose import RewardSum
from tests.builders import TOKENIZER, run_of, tiny

EOS = TOKENIZER.eos_id
TEXTS = ["abc", "d", "efghi", "jk", "abcdefg"]  # in a context of 12, the last leaves 5 tokens of room


class Texts:
    """A source whose training texts are in the order given, each with its number and, but for the first, a mark."""

    def __init__(self, texts: list[str] = TEXTS) -> None:
        self.counts: dict[str, int] = {}
        self.texts = texts

    def rows(self, split: str) -> list[Row]:
        columns = [{"number": i} | ({"mark": t[0]} if i else {}) for i, t in enumerate(self.texts)]
        return [Row(t, c, f"list:{i}") for i, (t, c) in enumerate(zip(self.texts, columns, strict=True))]


def weighed(completions: list[str], number: list[int], **_: Any) -> list[float | None]:
    """What depends on the completion and the row, and does not count completions that start with "b"."""
    return [None if text.startswith("b") else len(text) / 8 + i for text, i in zip(completions, number, strict=True)]


def parts(prompts: list[str], completion_ids: list[list[int]], mark: list[str | None], **_: Any) -> list[float]:
    """What depends on the prompt's text, on every token and on a column that a row lacks."""
    triples = zip(prompts, completion_ids, mark, strict=True)
    return [len(p) + sum((t + 1) * i for t, i in enumerate(ids)) / 64 - (m is None) for p, ids, m in triples]


def both() -> RewardSum:
    functions: dict[str, Any] = {"weighed": weighed, "parts": parts}
    return RewardSum(functions, weights={"weighed": 0.5, "parts": 2.0}, timeouts=dict.fromkeys(functions, 60.0))


def only(function: Any) -> RewardSum:
    return RewardSum({"r": function}, weights={"r": 1.0}, timeouts={"r": 60.0})


def prompt_data(texts: list[str] = TEXTS) -> PromptData:
    return PromptData(Texts(texts), tokenizer=TOKENIZER)


def env(texts: list[str] = TEXTS, **changes: Any) -> TextEnv:
    defaults: dict[str, Any] = {
        "tokenizer": TOKENIZER, "rewards": both(), "max_new_tokens": 6, "context_length": 12,
    }  # fmt: skip
    return TextEnv(prompt_data(texts), **(defaults | changes))


def episode(environment: TextEnv, tokens: list[int], prompt: int = 0) -> list[tuple]:
    """The results of every step."""
    environment.reset(options={"prompt": prompt})
    return [environment.step(token) for token in tokens]


def test_gymnasiums_checker_passes_without_a_warning():
    spec = EnvSpec(
        id="Text-v0",
        entry_point=TextEnv,  # type: ignore[arg-type]
        kwargs={"data": prompt_data(), "tokenizer": TOKENIZER, "rewards": both(), "max_new_tokens": 6,
                "context_length": 12},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(spec, disable_env_checker=True).unwrapped)


def test_the_rollouts_tokens_replayed_have_its_returns_and_its_ends():
    policy = tiny(3, spread=0.3, n_positions=12)
    run = run_of(policy, prompt_data(), max_new_tokens=6)
    samples = draw(run, run.data.prompts("train"), sampling=run.sampling, group_size=8, seed=1).score(both())
    rollout, scored, prompts = samples.rollout, samples.rewards, samples.prompt_of_row
    environment, ends = env(), set()
    for row, tokens in enumerate(rollout.completions()):
        steps = episode(environment, tokens, prompt=row // 8)
        assert [step[1:4] for step in steps[:-1]] == [(0.0, False, False)] * (len(tokens) - 1)
        _, reward, terminated, truncated, info = steps[-1]
        assert reward == float(scored.total[row])  # to the bit
        values = {name: float(value[row]) for name, value in scored.components.items()}
        assert info["rewards"] == {name: None if math.isnan(value) else value for name, value in values.items()}
        assert (terminated, truncated) == (
            rollout.finish_reasons[row] == "stop",
            rollout.finish_reasons[row] == "length",
        )
        assert info["completion"] == TOKENIZER.decode(tokens) and info["prompt"] == prompts[row].text
        ends.add((rollout.finish_reasons[row], len(tokens)))
    assert {("length", 6), ("length", 5)} < ends and any(reason == "stop" for reason, _ in ends)
    assert scored.components["weighed"].isnan().any()


def test_an_observation_is_the_ids_so_far_and_their_number():
    environment = env()
    first, info = environment.reset(options={"prompt": 3})  # "jk"
    assert info == {"prompt": "jk"}
    assert first["ids"].tolist() == [9, 10] + [0] * 10 and first["length"] == 2
    assert first["ids"].dtype == np.int64 and first in environment.observation_space
    second, *_, info = environment.step(0)
    assert second["ids"].tolist() == [9, 10, 0] + [0] * 9 and second["length"] == 3
    assert info == {"prompt": "jk"}
    third = environment.step(np.int64(EOS))[0]
    assert third["ids"].tolist() == [9, 10, 0, 11] + [0] * 8 and third["length"] == 4
    assert first["length"] == 2 and first["ids"][2:].tolist() == [0] * 10  # what was returned is not written to again


@pytest.mark.parametrize(
    ("tokens", "prompt", "terminated"),
    [([EOS], 0, True), ([1, 2, EOS], 0, True), ([1] * 6, 0, False), ([1] * 5 + [EOS], 0, True), ([1] * 5, 4, False),
     ([1] * 4 + [EOS], 4, True)],
)  # fmt: skip
def test_the_end_token_terminates_and_the_longest_completion_or_context_truncates(tokens, prompt, terminated):
    steps = episode(env(), tokens, prompt)
    assert [(t, u) for _, _, t, u, _ in steps[:-1]] == [(False, False)] * (len(tokens) - 1)
    assert steps[-1][2:4] == (terminated, not terminated)
    assert [name in steps[-1][4] for name in ("completion", "rewards", "is_counted")] == [True] * 3


def test_without_an_end_token_only_length_ends_an_episode():
    class Endless:
        vocab_size, eos_id, decode = 12, None, TOKENIZER.decode

    steps = episode(env(tokenizer=Endless()), [EOS] * 6)
    assert [(t, u) for _, _, t, u, _ in steps] == [(False, False)] * 5 + [(False, True)]


def test_the_reward_is_the_weighted_sum_at_the_end():
    *_, (_, reward, _, _, info) = episode(env(), [2, 0, EOS], prompt=1)  # prompt "d", number 1, completion "ca"
    expected = {"weighed": 2 / 8 + 1, "parts": 1 + (2 + 0 + 3 * 11) / 64}
    assert info["rewards"] == expected
    assert reward == 0.5 * expected["weighed"] + 2.0 * expected["parts"]
    assert info["completion"] == "ca" and info["is_counted"] is True


def test_a_completion_that_no_reward_counts_has_reward_zero_and_says_so():
    environment = env(rewards=only(weighed))
    _, reward, _, _, info = episode(environment, [1, EOS])[-1]
    assert reward == 0.0 and info["is_counted"] is False and info["rewards"] == {"r": None}
    _, reward, _, _, info = episode(environment, [EOS])[-1]  # an empty completion, counted: 0 / 8 + 0
    assert reward == 0.0 and info["is_counted"] is True


def test_a_completion_that_some_reward_counts_has_its_share():
    _, reward, _, _, info = episode(env(), [1, EOS], prompt=1)[-1]
    assert info["rewards"]["weighed"] is None and info["is_counted"] is True
    assert reward == 2.0 * info["rewards"]["parts"]


def test_a_seed_gives_the_prompts_of_a_run_of_that_seed_one_at_a_time():
    environment, data = env(), prompt_data()
    for seed in (7, 8, 7):
        texts = [environment.reset(seed=seed)[1]["prompt"]] + [environment.reset()[1]["prompt"] for _ in range(11)]
        assert texts == [data.batch(step, size=1, seed=seed)[0].text for step in range(12)]
    assert sorted(texts[:5]) == sorted(texts[5:10]) == sorted(TEXTS)


def test_an_unseeded_environment_starts_at_seed_zero_and_two_are_alike():
    expected = [TEXTS[i] for i in order(5, seed=0, start=0, count=7)]
    for _ in range(2):
        environment = env()
        assert [environment.reset()[1]["prompt"] for _ in range(7)] == expected


def test_a_given_prompt_counts_as_an_episode_and_moves_no_other():
    environment = env()
    drawn = [TEXTS[i] for i in order(5, seed=4, start=0, count=3)]
    assert environment.reset(seed=4)[1]["prompt"] == drawn[0]
    assert environment.reset(options={"prompt": np.int64(2)})[1]["prompt"] == TEXTS[2]
    assert environment.reset()[1]["prompt"] == drawn[2]


def test_a_reset_in_the_middle_of_an_episode_forgets_it():
    environment = env()
    episode(environment, [1, 2, 3])
    observation, _ = environment.reset(options={"prompt": 0})
    assert observation["length"] == 3
    assert episode(environment, [EOS])[-1][4]["completion"] == ""


@pytest.mark.parametrize("action", [-1, 12, 1.0, "a", None, [1], torch.tensor(1), np.float64(1)], ids=repr)
def test_an_action_that_is_no_token_is_refused_and_the_episode_goes_on(action):
    environment = env()
    episode(environment, [1])
    with pytest.raises(ValueError, match=r"action=.* is not a token id, an integer in 0 \.\. 11"):
        environment.step(action)
    assert environment.step(EOS)[4]["completion"] == "b"


def test_a_step_without_an_episode_is_refused():
    environment = env()
    with pytest.raises(ResetNeeded, match="call reset"):
        environment.step(1)
    episode(environment, [EOS])
    with pytest.raises(ResetNeeded, match="call reset"):
        environment.step(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt": 1}, r"unknown option 'promt' \(did you mean 'prompt'\?\); allowed: prompt"),
        ({"prompt": 5}, r"options\['prompt'\]=5 must be an integer in 0 \.\. 4"),
        ({"prompt": -1}, r"options\['prompt'\]=-1 must be"),
        ({"prompt": "abc"}, r"options\['prompt'\]='abc' must be"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        env().reset(options=options)


@pytest.mark.parametrize(
    ("texts", "changes", "error", "message"),
    [
        (TEXTS, {"max_new_tokens": 0}, ConfigError, "max_new_tokens must be at least 1, got 0"),
        (TEXTS, {"vocab_size": 11}, ConfigError, "vocab_size=11 is less than the tokenizer's 12 tokens"),
        (TEXTS, {"context_length": 7}, DataError, "list:4: a prompt of 7 tokens leaves no room in a context of 7"),
        ([], {}, DataError, "the train split has no prompt"),
        (TEXTS, {"split": "training"}, ConfigError, "did you mean 'train'"),
    ],
)
def test_what_cannot_be_played_is_refused_at_once(texts, changes, error, message):
    with pytest.raises(error, match=message):
        env(texts, **changes)


def test_the_actions_of_a_policy_with_more_entries_than_the_tokenizer_are_taken():
    environment = env(vocab_size=16)
    assert environment.action_space.n == 16
    steps = episode(environment, [15, 0, EOS])
    assert steps[0][0]["ids"][3] == 15 and steps[-1][4]["completion"] == "a"
    assert steps[0][0] in environment.observation_space


def test_without_gymnasium_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "rlft.envs.text_env")
    with pytest.raises(ConfigError, match=r"pip install 'rlft\[envs\]'"):
        importlib.import_module("rlft.envs.text_env")
