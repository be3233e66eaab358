"""The check of the whole configuration after composition: nothing unknown or mistyped gets past it.

Hydra refuses an unknown key on the command line but adds one that stands in an experiment file, and `_partial_` hides a
wrong argument until the call. So the composed configuration is checked as a whole: root keys and types against
`RootSettings`, each node with a `_target_` against that callable's signature. Nothing is built by the check.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import re
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlft import choices
from rlft.core.errors import ConfigError, nearest
from rlft.core.paths import conf_directory
from rlft.core.ranges import Choice, Range
from rlft.core.settings import RootSettings, parameters_of


@dataclass(frozen=True)
class RootConfig(RootSettings):
    """The whole configuration, resolved, as plain values."""

    model: dict
    reference: dict
    algo: dict
    reward: dict
    data: dict
    hardware: dict
    tracker: dict


# The groups, and what rlft/build.py hands to each one's callable: no setting may have that name.
GROUPS: dict[str, tuple[str, ...]] = {
    "model": (),
    "reference": ("policy", "data", "tokenizer"),
    "algo": ("run",),
    "reward": (),
    "data": ("tokenizer",),
    "hardware": (),
    "tracker": (),
}
NODE = object()  # the hint of a value that is built from a node with a _target_
# What rlft/build.py itself reads of a group's YAML, and its type.
READ_BY_BUILD: dict[str, dict[str, Any]] = {"model": {"tokenizer": NODE}, "reward": {"weight": float, "timeout": float}}
TUPLES = ("betas", "trusted_modules")  # root settings that are tuples, and lists in YAML
_HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}
_NO_CHOICE = re.compile(rf"\+*({'|'.join(GROUPS)}|experiment|hydra|[\w/]+/\w+|)=(-?[\d.]+|null|true|false|\[.*\])$")
LARGEST = 2**63 - 1  # a whole number in a tensor, or a key of a random draw


def checked(config: DictConfig) -> RootConfig:
    """Return the composed configuration as plain values; raises `ConfigError` naming the key that is wrong."""
    _check_keys(OmegaConf.to_container(config, resolve=False))
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return checked_values(values)


def checked_values(values: dict[str, Any]) -> RootConfig:
    """Check plain values as a configuration, and import the targets that they name; raises as `checked` does."""
    _check_keys(values)
    _check_plain("", values)
    root = {key: value for key, value in values.items() if key not in GROUPS}
    for field in fields(RootSettings):
        if field.type == "bool" and field.name in root:  # OmegaConf takes any number for a bool
            _check_type(field.name, root[field.name], bool)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RootSettings), root)
        typed: Any = OmegaConf.to_container(merged, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _type_error(error) from error
    _check_plain("", typed)  # "nan" has become a number
    _check_root(typed)
    groups: dict[str, Any] = {group: {} if values.get(group) is None else values[group] for group in GROUPS}
    for group, node in groups.items():
        check_group(group, node)
    return RootConfig(**(typed | groups | {key: tuple(typed[key]) for key in TUPLES}))


def root_settings(**changes: Any) -> RootSettings:
    """Return the root settings of conf/train.yaml with changes, checked; for a run that is put together in Python."""
    values = root_defaults() | {"name": "run"} | changes
    _check_root(values)
    return RootSettings(**(values | {name: tuple(values[name]) for name in TUPLES}))


def root_defaults() -> dict[str, Any]:
    """Return the root settings as conf/train.yaml has them, but for `name`, which Hydra fills in."""
    values = yaml.safe_load((conf_directory() / "train.yaml").read_text(encoding="utf-8"))
    return {field.name: values[field.name] for field in fields(RootSettings) if field.name != "name"}


def _check_keys(values: Any) -> None:
    """Raise `ConfigError` for a root key that does not exist, and for a value that is left open."""
    known = [field.name for field in fields(RootConfig)]
    for key in map(str, values):
        if key not in known:
            raise ConfigError(f"unknown setting '{key}'{nearest(key, known)}; conf/train.yaml lists the root settings")
    for key in missing_keys(values):
        raise ConfigError(f"{key} is not set, and has no default: give {key}=…")


def _check_plain(path: str, value: Any) -> None:
    """Raise `ConfigError` for what no setting can be, also in dicts and lists: nan, huge integers, NUL in a text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path or 'the configuration'} has the key {key!r}, which is not a name")
            _check_plain(f"{path}.{key}" if path else key, inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_plain(f"{path}[{index}]", inner)
    elif isinstance(value, str) and not _is_text(value):
        raise ConfigError(f"{path}={value!a} holds a NUL character, or bytes that are not UTF-8")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value} must be finite")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{path}={value} must be at most {LARGEST} in size; a larger number is written as 1.0e30")


def _is_text(value: str) -> bool:
    return "\0" not in value and value.encode("utf-8", "replace").decode() == value


def missing_keys(node: Any, prefix: str = "") -> list[str]:
    """Return the keys that are left open, as ???, in an unresolved configuration."""
    if node == "???":
        return [prefix]
    if not isinstance(node, dict):
        return []
    return [key for name, part in node.items() for key in missing_keys(part, f"{prefix}.{name}" if prefix else name)]


def composition_error(error: Exception, *, overrides: Sequence[str] = ()) -> ConfigError:
    """Turn Hydra's error about an override into a `ConfigError` that names the nearest valid name."""
    text = " ".join(str(error).split())
    is_foreign = not isinstance(error, (HydraException, OmegaConfBaseException))
    if is_foreign and (groups := [one for one in overrides if _NO_CHOICE.match(one)]):  # Hydra does not say which
        return ConfigError(f"{groups[0]}: a group is given the name of a file under conf/, as algo=grpo is ({text})")
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override} is not an override: {text}")
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
        root, _, rest = key.partition(".")
        known = [field.name for field in fields(RootConfig)]
        if rest and root in known:
            leaf, where = rest.rpartition(".")[2], f"conf/{root}/ has what its files set"
            hint = (
                f" (did you mean the root setting '{leaf}'?)" if leaf in known else nearest(leaf, choices.keys_of(root))
            )
        elif (group := root.partition("/")[0]) in known and (conf_directory() / root).is_dir():
            hint, where = "", f"it is chosen with {choices.choosing(root)}"
        elif (conf_directory() / root).is_dir() and root not in known:
            hint, where = "", f"a file of conf/{root}/ is added by +{key}=NAME"
        elif (conf_directory() / "algo" / root).is_dir():
            hint, where = "", f"a part of an algorithm is chosen by algo/{key}=NAME"
        else:
            hint, where = nearest(root, known), "conf/train.yaml lists them"
        return ConfigError(f"unknown setting '{key}'{hint}; {where}")
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.*?)(?: Config search|$)", text
    ):
        group, name, options = found[1], found[2], found[3].split()
        return ConfigError(f"{group}={name} does not exist{choices.meant(group, name, options)}")
    if found := re.search(r"Could not load '([^']+)/([^'/]+)'", text):  # a name in a list: reward=[sentiment,length]
        options = sorted(file.stem for file in (conf_directory() / found[1]).glob("*.yaml"))
        return ConfigError(f"{found[1]}=[{found[2]}] does not exist{choices.meant(found[1], found[2], options)}")
    return ConfigError(text)


def _type_error(error: Exception) -> ConfigError:
    """Turn OmegaConf's error about the type of a root setting into a `ConfigError`."""
    text = " ".join(str(error).split())
    if found := re.search(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+) full_key: (\S+)", text):
        value, kind, wanted, key = found.groups()
        names = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "a text"}
        return ConfigError(f"{key}={value} is a {kind}; {names.get(wanted, wanted)} is allowed")
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return ConfigError(f"{found[1]} is not set, and has no default: give {found[1]}=…")
    if found := re.search(r"is not a ListConfig, list or tuple. full_key: (\S+)", text):
        return ConfigError(f"{found[1]} is a list: {found[1]}=[…]")
    return ConfigError(text)


def _check_root(root: dict[str, Any]) -> None:
    for name, hint in typing.get_type_hints(RootSettings, include_extras=True).items():
        _check_type(name, root[name], hint)
    if root["patience"] is not None and not root["eval_every"]:
        raise ConfigError(f"patience={root['patience']} counts evaluations, and eval_every=0 has none: set eval_every")
    if root["steps"] and root["warmup_steps"] >= root["steps"]:
        raise ConfigError(f"warmup_steps={root['warmup_steps']} must be below steps={root['steps']}")
    if len(root["betas"]) != 2 or not all(0 <= beta < 1 for beta in root["betas"]):
        raise ConfigError(f"betas={root['betas']} must be two numbers in [0, 1)")


def check_group(group: str, node: dict[str, Any]) -> None:
    """Raise `ConfigError` for what is wrong in the settings of a group, as plain values."""
    if group == "reward":
        if not isinstance(node, dict):
            raise ConfigError(f"reward={node!r} is not a group choice; see the files under conf/reward/")
        for name, reward in node.items():
            _check_node(f"reward.{name}", reward, given=GROUPS[group], read=READ_BY_BUILD[group])
    else:
        _check_node(group, node, given=GROUPS[group], read=READ_BY_BUILD.get(group, {}))


def _check_node(path: str, node: Any, *, given: Collection[str], read: dict[str, Any]) -> None:
    """Check a `_target_` node's keys against its callable's signature, then the nodes inside it."""
    if not isinstance(node, dict):
        raise ConfigError(
            f"{path}={node!r} is not a group choice; see the files under conf/{path.split('.')[0]}/ "
            f"(one in a folder there is chosen as algo/kl=k3 is)"
        )
    if "_target_" not in node:
        raise ConfigError(f"{path} has no _target_: choose one of the files under conf/{path.split('.')[0]}/")
    if "_args_" in node:
        raise ConfigError(f"{path}._args_ cannot be set: each argument of {node['_target_']} is given by its name")
    for key in ("_partial_", "_recursive_"):
        _check_type(f"{path}.{key}", node.get(key, False), bool)
    try:
        target = get_method(node["_target_"])
        parameters = parameters_of(target)
    except Exception as error:  # hydra wraps import errors of every kind
        why = " ".join(str(error).split())  # one line: the last of stderr names the key
        raise ConfigError(f"{path}._target_={node['_target_']} cannot be used: {why}") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p, _ in parameters.values())
    named = [name for name, (p, _) in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    has_default = {name for name, (p, _) in parameters.items() if p.default is not p.empty}
    hints = {name: hint for name, (_, hint) in parameters.items()} | read
    for key, value in node.items():
        if key in _HYDRA_KEYS:
            continue
        if key in given:
            raise ConfigError(f"{path}.{key} cannot be set: it is handed in by the run")
        if key not in named and key not in read and not takes_any:
            settable = [name for name in [*named, *read] if name not in given and name != "self"]
            if node.get("_partial_"):  # what has no default is a tensor, handed in at each call
                settable = [n for n in settable if n in node or n in has_default]
            raise ConfigError(
                f"unknown setting '{path}.{key}'{nearest(key, settable)}{choices.taken_by(node['_target_'], key)}; "
                f"allowed: {', '.join(settable) or 'none'}"
            )
        if key in hints:
            _check_type(f"{path}.{key}", value, hints[key])
    missing = [name for name in named if name not in has_default and name not in node and name not in given]
    if missing and not node.get("_partial_"):
        hint = (
            " (the YAML of a function that is called later has _partial_: true)" if inspect.isfunction(target) else ""
        )
        raise ConfigError(f"{path}.{missing[0]} is not set, and has no default{hint}")
    for key, value in node.items():
        options = _options(hints.get(key))
        is_open = value is None and type(None) in options
        if (any(map(_is_node, options)) and not is_open) or (isinstance(value, dict) and "_target_" in value):
            _check_node(f"{path}.{key}", value, given=(), read={})


def _is_node(hint: Any) -> bool:
    """Whether a value with this annotation is built from a node with a _target_: one of our classes, or a function."""
    is_ours = inspect.isclass(hint) and hint.__module__.startswith("rlft.")
    return hint is NODE or is_ours or typing.get_origin(hint) is collections.abc.Callable


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _check_type(path: str, value: Any, hint: Any) -> None:
    """Check values of plain types (str, int, float, bool, None, unions of them, ranges of numbers and choices) only."""
    ranges = [extra for option in _options(hint) for extra in getattr(option, "__metadata__", ())]
    options = [getattr(option, "__origin__", option) if ranges else option for option in _options(hint)]
    if not set(options) <= {str, int, float, bool, type(None)}:
        return
    allowed = tuple(options) + ((int,) if float in options else ())
    is_stray_bool = isinstance(value, bool) and bool not in options
    if not isinstance(value, allowed) or is_stray_bool:
        names = " or ".join("null" if option is type(None) else option.__name__ for option in options)
        raise ConfigError(f"{path}={value!r} is a {type(value).__name__}; {names} is allowed")
    for limits in ranges:
        if isinstance(limits, Range | Choice) and value is not None and (refusal := limits.refusal(value)):
            raise ConfigError(f"{path}={value} must be {refusal}")
