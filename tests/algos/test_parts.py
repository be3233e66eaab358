from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest

from rlft.algos.parts import Part, composed, function_of
from rlft.core.errors import ConfigError

TENSORS, FROM_RUN = ("rewards", "mask", "values"), ("group_size",)
AVAILABLE = {"rewards": 3.0, "mask": 2.0, "values": 7.0, "group_size": 4}


def made(part: Any) -> Part:
    return composed(part, where="algo/part", tensors=TENSORS, from_run=FROM_RUN)


def weighted(rewards: float, mask: float = 1.0, factor: float = 9.0, *, power: int = 1) -> float:
    return (factor * rewards * mask) ** power


def misspelt(rewards: float, maks: float) -> float:
    return rewards * maks


def without_default(rewards: float, *, gamma: float) -> float:
    return gamma * rewards


@dataclass
class Scaled:  # which compares by value, and so has no hash
    factor: float

    def __call__(self, rewards: float, *, group_size: int) -> float:
        return self.factor * rewards * group_size


@dataclass
class Misspelt:
    def __call__(self, reward: float) -> float:
        return reward


def test_a_part_gets_what_its_signature_names_beside_its_settings() -> None:
    assert made(functools.partial(weighted, factor=0.5))(**AVAILABLE) == 3.0
    assert made(functools.partial(weighted, factor=0.5, power=2))(**AVAILABLE) == 9.0
    assert made(lambda values: values)(**AVAILABLE) == 7.0


def test_a_setting_of_yaml_goes_before_the_tensor_of_the_same_name() -> None:
    part = made(functools.partial(weighted, factor=0.5, mask=5.0))
    assert (part(**AVAILABLE), part.names) == (7.5, {"rewards"})


def test_an_instance_with_a_call_is_a_part_of_its_own_class_and_module() -> None:
    part = made(Scaled(0.5))
    assert (part(**AVAILABLE), part.names, part.module) == (6.0, {"rewards", "group_size"}, __name__)


def test_a_part_that_takes_anything_is_refused() -> None:
    def greedy(rewards: float, **others: Any) -> float:
        return rewards

    with pytest.raises(ConfigError, match=r"algo/part: greedy takes any \*\*others; it must name what it takes"):
        made(greedy)


def test_a_misspelt_setting_of_the_run_is_refused_although_it_has_a_default() -> None:
    def mean(rewards: float, *, group_siz: int = 1) -> float:
        return rewards

    with pytest.raises(ConfigError, match=r"mean takes 'group_siz' \(did you mean 'group_size'\?\)"):
        made(mean)
    assert made(functools.partial(mean, group_siz=2))(**AVAILABLE) == 3.0  # the YAML says that it is meant


def test_names_are_those_that_it_is_called_with() -> None:
    assert made(functools.partial(weighted, factor=0.5)).names == {"rewards", "mask"}
    assert made(functools.partial(without_default, gamma=1.0)).names == {"rewards"}
    assert made(Scaled(1.0)).names == {"rewards", "group_size"}
    assert made(lambda rewards, *, group_size: rewards).names == {"rewards", "group_size"}


def test_a_misspelt_tensor_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as refused:
        made(misspelt)
    assert str(refused.value) == (
        "algo/part: misspelt asks for the tensor 'maks' (did you mean 'mask'?); there are rewards, mask, values (a "
        "setting stands behind a * in the signature)"
    )


def test_an_instance_that_misspells_a_tensor_is_refused_by_its_class() -> None:
    with pytest.raises(ConfigError, match=r"^algo/part: Misspelt asks for the tensor 'reward' .*'rewards'\?\)"):
        made(Misspelt())


@pytest.mark.parametrize("part", [lambda returns, rewards: rewards, lambda rewards, group_size: rewards])
def test_a_tensor_that_there_is_not_is_refused_and_so_is_a_setting_of_the_run_in_a_tensors_place(part: Any) -> None:
    with pytest.raises(ConfigError, match=r"<lambda> asks for the tensor '(returns|group_size)'"):
        made(part)


def test_a_keyword_only_setting_without_a_default_is_refused_where_neither_yaml_nor_run_gives_it() -> None:
    with pytest.raises(ConfigError, match=r"^algo/part\.gamma is not set, and without_default has no default for it$"):
        made(without_default)
    assert made(functools.partial(without_default, gamma=0.5))(**AVAILABLE) == 1.5
    assert made(lambda rewards, *, group_size: rewards * group_size)(**AVAILABLE) == 12.0
    assert made(lambda rewards, *, eps=0.25: rewards + eps)(**AVAILABLE) == 3.25


def test_a_positional_setting_is_refused_unless_yaml_sets_it() -> None:
    with pytest.raises(ConfigError, match=r"weighted asks for the tensor 'factor'"):
        made(weighted)
    assert made(functools.partial(weighted, factor=1.0))(**AVAILABLE) == 6.0


def test_the_function_under_fixed_settings() -> None:
    scaled = Scaled(1.0)
    assert function_of(functools.partial(weighted, factor=1.0)) is weighted
    assert function_of(weighted) is weighted
    assert function_of(scaled) is scaled


def test_a_part_whose_first_argument_is_fixed_by_position_is_called_with_it():
    def scaled(scale: float, x: float) -> float:
        return scale * x

    part = composed(functools.partial(scaled, 3.0), where="algo/part", tensors=("scale", "x"))
    assert part(scale=5.0, x=2.0) == 6.0
