"""conf/reward/*.yaml: each composes, alone and together, and names exactly the arguments of its class."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from rlft.rewards.compose import RewardSum

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "reward").glob("*.yaml"))
SHIPPED = ["custom", "keyword", "length", "phrase_ending", "repetition", "sentiment", "sentiment_model"]


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(overrides=list(overrides)))
    return config["reward"]


def test_every_reward_has_its_file() -> None:
    assert set(SHIPPED) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_lands_under_its_own_name_with_weight_timeout_and_its_class_arguments(name: str) -> None:
    reward = composed(f"+reward={name}")
    assert list(reward) == [name]
    values = reward[name]
    assert values.pop("weight") == 1.0
    assert values.pop("timeout") > 0
    cls = get_class(values.pop("_target_"))
    assert set(values) == set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("name", ["sentiment", "sentiment_model", "phrase_ending", "repetition"])
def test_a_file_says_the_defaults_of_its_class(name: str) -> None:
    values = composed(f"+reward={name}")[name]
    for key, parameter in inspect.signature(get_class(values["_target_"])).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert values[key] == parameter.default


def test_rewards_compose_into_one_sum_with_their_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    values = composed(
        "+reward=[length,repetition,keyword,phrase_ending,custom]",
        "reward.length.weight=2.0",
        "reward.repetition.weight=0.5",
        "reward.keyword.keywords=[great,film]",
        f"reward.custom.function={tmp_path / 'mine.py'}:reward",
        "reward.custom.weight=-1",
    )
    weights = {name: part.pop("weight") for name, part in values.items()}
    timeouts = {name: part.pop("timeout") for name, part in values.items()}
    rewards = {name: instantiate(part, _convert_="all") for name, part in values.items()}
    total = RewardSum(rewards, weights=weights, timeouts=timeouts)
    out = total(prompts=[""], completions=["a film, a film!"], completion_ids=[[1] * 10], columns={})
    # length: 2 short of 12; repetition: "a film" again, 1 of 5 bigrams; keyword: 1 of 2; it ends with a mark
    expected = {"length": -0.1, "repetition": -0.2, "keyword": 0.5, "phrase_ending": 1.0, "custom": 1.0}
    assert {name: part.item() for name, part in out.components.items()} == pytest.approx(expected, rel=1e-6)
    assert out.total.item() == pytest.approx(2.0 * -0.1 + 0.5 * -0.2 + 0.5 + 1.0 - 1.0, rel=1e-6)  # float32
