"""Settings that a constructor takes as one object, and that stand flat in YAML."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import pytest
import yaml

from rlft.algos.base import Run
from rlft.algos.online.composition import Composition
from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.config import root_settings
from rlft.core.errors import ConfigError
from rlft.core.paths import conf_directory
from rlft.core.ranges import Count, Size
from rlft.core.settings import RootSettings, SettingsGroup, gathered, parameters_of


@dataclass(frozen=True)
class Schedule(SettingsGroup):
    warmup: int
    decay: float = 0.5


@dataclass(frozen=True)
class Steps(SettingsGroup):
    count: Count
    schedule: Schedule


class Owner:
    def __init__(self, name: str, steps: Steps, *, size: Size | None = None) -> None:
        self.name, self.steps, self.size = name, steps, size


def function(run: Run, schedule: Schedule, *, rate: float = 1.0) -> tuple:
    return run, schedule, rate


def plain(x: int, *rest: int, **others: int) -> int:
    return x


FLAT: dict[str, Any] = {"name": "a", "count": 3, "warmup": 2, "decay": 0.25, "size": 7}


def test_fields_of_nested_groups_stand_beside_the_other_parameters():
    found = parameters_of(Owner)
    assert list(found) == ["name", "count", "warmup", "decay", "size"]
    assert {name: hint for name, (_, hint) in found.items()} == {
        "name": str, "count": Count, "warmup": int, "decay": float, "size": Size | None,
    }  # fmt: skip
    defaults = {name: parameter.default for name, (parameter, _) in found.items()}
    required = [name for name, default in defaults.items() if default is inspect.Parameter.empty]
    assert required == ["name", "count", "warmup"] and (defaults["decay"], defaults["size"]) == (0.5, None)


def test_what_has_no_group_has_its_own_parameters():
    assert list(parameters_of(plain)) == ["x", "rest", "others"]
    assert list(parameters_of(function)) == ["run", "warmup", "decay", "rate"]
    assert gathered(plain, {"x": 1, "y": 2}) == {"x": 1, "y": 2}


def test_flat_values_become_the_groups_objects_and_stay_as_they_were_given():
    given = dict(FLAT)
    made = gathered(Owner, given)
    assert made == {"name": "a", "steps": Steps(3, Schedule(2, 0.25)), "size": 7}
    assert given == FLAT
    owner = Owner(**made)
    assert (owner.steps.schedule.warmup, owner.steps.count) == (2, 3)
    assert gathered(function, {"warmup": 4}) == {"schedule": Schedule(4)}  # what is left to others stays open


def test_objects_and_flat_values_are_two_ways_to_say_the_same():
    owner = Owner(**gathered(Owner, FLAT))
    flat: dict[str, Any] = {"name": owner.name, "size": owner.size}
    for group in (owner.steps, owner.steps.schedule):
        flat |= {field.name: getattr(group, field.name) for field in fields(group)}
    del flat["schedule"]
    assert flat == FLAT and flat.keys() == parameters_of(Owner).keys()


@pytest.mark.parametrize("missing", ["count", "warmup"])
def test_a_field_that_is_missing_is_named(missing):
    flat = {name: value for name, value in FLAT.items() if name != missing}
    with pytest.raises(TypeError, match=rf"missing 1 required positional argument: '{missing}'"):
        gathered(Owner, flat)


def test_a_name_that_no_group_has_is_left_to_the_constructor_to_refuse():
    made = gathered(Owner, FLAT | {"warmpu": 1})
    assert made["warmpu"] == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmpu'"):
        Owner(**made)


def test_no_two_groups_of_an_algorithm_share_a_name():
    hints = get_type_hints(Composition)
    groups = [name for name, hint in hints.items() if inspect.isclass(hint) and issubclass(hint, SettingsGroup)]
    names = [field.name for group in (Composition, *(hints[name] for name in groups)) for field in fields(group)]
    assert len(groups) == 5 and len(set(names)) == len(names)
    assert parameters_of(PolicyGradient).keys() == {"run", *names} - set(groups)


# The root settings.


def test_every_root_setting_is_in_train_yaml_and_the_other_way_round():
    written = yaml.safe_load((conf_directory() / "train.yaml").read_text(encoding="utf-8"))
    names = [field.name for field in fields(RootSettings)]
    assert set(written) - set(names) == {"defaults", "hydra"}
    assert set(names) <= set(written)


def test_root_settings_made_in_python_are_those_of_train_yaml_with_changes():
    written = yaml.safe_load((conf_directory() / "train.yaml").read_text(encoding="utf-8"))
    made = root_settings(steps=7, betas=(0.5, 0.6))
    assert (made.name, made.seed, made.steps, made.betas) == ("run", 0, 7, (0.5, 0.6))
    others = {field.name for field in fields(RootSettings)} - {"name", "seed", "steps", "betas", "trusted_modules"}
    assert {name: getattr(made, name) for name in others} == {name: written[name] for name in others}
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepss'"):
        root_settings(stepss=3)


def test_limits_of_a_forward_are_the_micro_batchs():
    made = root_settings(micro_batch=3, micro_batch_tokens=99)
    assert made.limits == {"max_rows": 3, "max_tokens": 99}


@pytest.mark.parametrize("setting", [{"patience": 2}, {"eval_every": 1}, {"steps": 0}])
def test_a_setting_that_asks_for_an_evaluation_is_refused_by_name_where_there_is_none(setting):
    root_settings(steps=3, eval_every=0, patience=None).check_without_evaluation()
    (name, value), *_ = setting.items()
    quiet = root_settings(steps=3, eval_every=0, patience=None)
    with pytest.raises(ConfigError, match=rf"^{name}={value} asks for an evaluation, and the data holds nothing out"):
        replace(quiet, **setting).check_without_evaluation()
