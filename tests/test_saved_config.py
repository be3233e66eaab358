"""rlft/saved_config.py: a run directory's config.yaml is checked as a command line is, and runs no foreign code."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlft.config import GROUPS, RootConfig
from rlft.core.errors import ConfigError, RunDirectoryError
from rlft.saved_config import from_run, read_config
from tests.test_config import config

MARK = "mine_was_imported"
MODULE = f"""
import os, sys
sys.{MARK} = True
def loss(logprobs, advantages):
    return -logprobs * advantages, {{}}
"""
RUN = Path("outputs/run")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine` that can be imported, and leaves a mark when it is."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delattr(sys, MARK, raising=False)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


def values_of(*overrides: str) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config(*overrides))))


DEFAULTS = values_of()


def changed(place: str, value: Any) -> dict[str, Any]:
    """The defaults with any value at a dotted place, whose parents are made."""
    values = copy.deepcopy(DEFAULTS)
    *parents, last = place.split(".")
    node = values
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return values


def from_values(values: dict[str, Any], *trusted: str, **given: Any) -> RootConfig:
    return from_run(values, run_dir=RUN, trusted=trusted, given=given)


@pytest.mark.parametrize(
    "place",
    [*(f"{group}._target_" for group in GROUPS if group != "reward"), "reward.sentiment._target_",
     "reward.other._target_", "algo.surrogate._target_", "algo.kl.controller._target_", "data.source._target_",
     "model.tokenizer._target_", "algo.kl.deep.er._target_", "data.source.path._target_"],
)  # fmt: skip
@pytest.mark.parametrize("target", ["mine.loss", "os.system", "builtins.exec", "mine", 3])
def test_a_target_that_is_not_rlfts_is_refused_in_every_place_and_not_imported(mine, place, target):
    with pytest.raises(ConfigError, match=rf"config.yaml: {re.escape(place)}={target} is code that is not rlft's"):
        from_values(changed(place, target))
    assert not hasattr(sys, MARK) and "mine" not in sys.modules


def test_a_target_inside_a_list_is_refused():
    with pytest.raises(ConfigError, match=r"reward\.sentiment\.words\.1\._target_=os\.system is code"):
        from_values(changed("reward.sentiment.words", [[], {"_target_": "os.system"}]))


@pytest.mark.parametrize(
    "target",
    [
        "rlft.build.os.system",  # a module that an rlft module imports
        "rlft.data.files.importlib.import_module",
        "rlft.models.gpt2.json.loads",
        "rlft.models.gpt2.torch.load",
        "rlft.build.algorithm",  # instantiates what it is given
        "rlft.run.run",
        "rlft.rewards.custom._from_module",  # imports what it is given
        "rlft.core.metrics.JsonlFile",
        "rlft.models.gpt2.GPT2.save_hf",  # a method, with an object of its own to be handed in
        "rlft.algos.base.Algorithm.check",
        "rlft.__main__.main",
        "rlftx.algos.X",
        "rlft.algos.parts.Part",  # calls what it is given
        "rlft.core.settings.gathered",
        "rlft.data.source.normalised",
    ],
)
def test_what_is_reached_through_rlft_but_is_no_part_of_it_is_refused(target):
    with pytest.raises(
        ConfigError,
        match=rf"tracker\._target_={re.escape(target)} is (no part of this version of rlft|code that is not rlft's)",
    ):
        from_values(changed("tracker._target_", target))


@pytest.mark.parametrize("place, value, message", [
    ("algo.kl.coef", "${oc.env:HOME}", "is an interpolation"),
    ("algo.probe", "${oc.create:'{_target_: os.system}'}", "is an interpolation"),
    ("name", "x\\${a}", "is an interpolation"),
    ("reward.sentiment._args_", ["x"], "_args_ cannot be checked"),
])  # fmt: skip
def test_what_would_be_computed_or_passed_unseen_is_refused(place, value, message):
    with pytest.raises(ConfigError, match=message):
        from_values(changed(place, value))


def test_a_trusted_module_is_taken_and_what_it_imports_is_not(mine):
    values = changed("algo.surrogate", {"_target_": "mine.loss", "_partial_": True})
    assert from_values(values, "mine").algo["surrogate"]["_target_"] == "mine.loss"
    assert hasattr(sys, MARK)
    for trusted in ((), ("min",), ("mine.other",), ("mines",), (str(mine),)):
        with pytest.raises(
            ConfigError, match=r"not trusted: add trusted_modules=\[mine\] .*, or give the settings of algo"
        ):
            from_values(values, *trusted)
    values["algo"]["surrogate"]["_target_"] = "mine.os.system"
    with pytest.raises(ConfigError, match=r"mine\.os\.system is code that is not rlft's"):
        from_values(values, "mine")


def test_a_file_cannot_trust_itself(mine):
    values = changed("algo.surrogate", {"_target_": "mine.loss", "_partial_": True}) | {"trusted_modules": ["mine"]}
    with pytest.raises(ConfigError, match=r"mine\.loss is code"):
        from_values(values)
    assert from_values(DEFAULTS | {"trusted_modules": ["mine"]}).trusted_modules == ()


@pytest.mark.parametrize("node", [
    {"function": {"_target_": "rlft.data.tasks.Task", "kind": "recite", "size": 1}},  # makes what is then imported
    {"_partial_": True},  # is handed its function when it is called
    {"function": ["mine.py:f"]},
])  # fmt: skip
def test_a_custom_reward_whose_function_is_not_written_out_is_refused_wherever_it_stands(node):
    custom = {"_target_": "rlft.rewards.custom.Custom", **node}
    for place in ("reward.custom", "data.source.path"):
        value = custom if place == "reward.custom" else {"train": [custom]}
        with pytest.raises(ConfigError, match=r"\.function=.* is code that is not rlft's"):
            from_values(changed(place, value), "mine.py", "mine")


def test_what_the_command_line_gives_again_is_the_users_own_word(mine):
    values = changed("algo.surrogate", {"_target_": "mine.loss", "_partial_": True})
    assert from_values(values, algo=values["algo"]).algo == values["algo"]
    with pytest.raises(ConfigError, match=r"mine\.loss is code"):
        from_values(values, reward=values["reward"])


@pytest.mark.parametrize("path, trusted, is_taken", [
    ("mine.py", "mine.py", True),
    ("mine.py", "./mine.py", True),
    ("{here}/mine.py", "mine.py", True),
    ("mine", "mine", True),
    ("mine.inner", "mine", True),
    ("mine.py", "mine", False),
    ("mine", "mine.py", False),
    ("mine.py", "other/mine.py", False),
    ("rlft.core.paths", "mine", False),
])  # fmt: skip
def test_the_function_of_a_custom_reward_needs_its_module_or_file_named(mine, monkeypatch, path, trusted, is_taken):
    monkeypatch.chdir(mine.parent)
    function = f"{path.format(here=mine.parent)}:f"
    values = changed("reward.custom", {"_target_": "rlft.rewards.custom.Custom", "function": function})
    with pytest.raises(ConfigError, match=r"reward\.custom\.function=.*:f is code that is not rlft's"):
        from_values(values)
    if is_taken:
        assert from_values(values, trusted).reward["custom"]["function"] == function
    else:
        with pytest.raises(ConfigError, match=r"is code that is not rlft's"):
            from_values(values, trusted)
    assert not hasattr(sys, MARK)


@pytest.mark.parametrize("place, value, message", [
    ("stepss", 3, "unknown setting 'stepss' (did you mean 'steps'?)"),
    ("algo.kl.coeff", 1, "unknown setting 'algo.kl.coeff' (did you mean 'coef'?)"),
    ("steps", "many", "steps=many is a str; a whole number is allowed"),
    ("steps", -1, "steps=-1 must be at least 0"),
    ("algo.kl.coef", float("nan"), "algo.kl.coef=nan must be finite"),
    ("tracker", 3, "tracker=3 is not a group choice"),
    ("run_dir", "a\0b", "holds a NUL"),
])  # fmt: skip
def test_a_saved_configuration_is_checked_as_a_command_line_is(place, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        from_values(changed(place, value))
    assert str(error.value).startswith(f"{RUN / 'config.yaml'}: ")


@pytest.mark.parametrize("data", [
    b"", b"steps", b"[1, 2]", b"steps: [", b"\xff\xfe\x00", b"steps: !!python/object/apply:os.system [ls]",
    b"a: &a [*a]", b"steps: 2001-02-30", b"steps: 2001-02-03", b"steps: \x00", b"[" * 5000,
])  # fmt: skip
def test_a_damaged_config_is_refused_in_one_line_with_its_path(tmp_path, data):
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path / 'config.yaml'))} is damaged: .+$") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_is_read_as_it_was_written_and_a_directory_without_one_holds_no_run(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no config"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(DEFAULTS, sort_keys=False))
    assert read_config(tmp_path) == DEFAULTS


def test_a_run_from_before_a_root_setting_was_there_has_its_default():
    values = copy.deepcopy(DEFAULTS)
    del values["profile"], values["rollout_rows"]
    assert from_values(values) == from_values(DEFAULTS)
    del values["name"]  # which no file of conf/ sets
    with pytest.raises(ConfigError, match="name is not set, and has no default: give name=…"):
        from_values(values)


def test_a_run_of_another_version_is_said_to_be_one():
    old = "rlft.algos.policy_gradient.PolicyGradient"
    with pytest.raises(
        ConfigError, match=rf"algo\._target_={old} is no part of this version of rlft: the run was made by"
    ):
        from_values(changed("algo._target_", old))
