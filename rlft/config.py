"""The configuration's schema, and its check after composition: nothing unknown or mistyped gets past it.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlft.core.errors import ConfigError, nearest
from rlft.core.paths import conf_directory
from rlft.core.ranges import Count, CountOrZero, NonNegative, Positive, Range, Size
from rlft.trainer.schedule import SCHEDULES


@dataclass(frozen=True)
class RootSettings:
    """The root settings; `conf/train.yaml` says what each means and holds its default."""

    name: str
    seed: CountOrZero
    run_dir: str | None
    resume: bool
    dry_run: bool
    trusted_modules: tuple[str, ...]
    steps: CountOrZero
    max_minutes: Positive | None
    max_tokens: Count | None
    patience: Count | None
    prompts_per_step: Size
    group_size: Size
    micro_batch: Size | None
    micro_batch_tokens: Size | None
    rollout_rows: Size | None
    max_new_tokens: Size
    temperature: Positive
    learning_rate: Positive
    warmup_steps: CountOrZero
    schedule: str
    final_learning_rate_fraction: NonNegative
    max_grad_norm: Positive
    weight_decay: NonNegative
    betas: tuple[float, float]
    eval_every: CountOrZero
    eval_prompts: Size
    save_every: CountOrZero
    keep: Count
    log_every: Count
    profile: bool


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


# What rlft/build.py hands to each group's callable; a setting of that name would be overwritten, and is refused.
GIVEN = {
    "model": [],
    "reference": ["policy", "data", "tokenizer"],
    "algo": [
        "policy", "reference", "rewards", "data", "tokenizer", "sampling", "seed",
        "device", "autocast", "is_float32", "rank", "world_size", "clock",
    ],
    "reward": [],
    "data": ["tokenizer"],
    "hardware": [],
    "tracker": [],
}  # fmt: skip
NODE = object()  # stands for the type of what is made from a node with a _target_: an object of ours, or a function
# What rlft/build.py itself reads of a group's YAML, and its type.
READ_BY_BUILD: dict[str, dict[str, Any]] = {"model": {"tokenizer": NODE}, "reward": {"weight": float, "timeout": float}}
_HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}
_NO_CHOICE = re.compile(rf"\+*({'|'.join(GIVEN)}|experiment|hydra|[\w/]+/\w+|)=(-?[\d.]+|null|true|false|\[.*\])$")
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
    """Return plain values, wherever they come from, as a configuration; raises as `checked` does. Imports targets."""
    _check_keys(values)
    _check_plain("", values)
    root = {key: value for key, value in values.items() if key not in GIVEN}
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
    groups: dict[str, Any] = {group: {} if values.get(group) is None else values[group] for group in GIVEN}
    for group, node in groups.items():
        _check_group(group, node)
    return RootConfig(**(typed | groups | {key: tuple(typed[key]) for key in ("betas", "trusted_modules")}))


def _check_keys(values: Any) -> None:
    """Raise `ConfigError` for a root key that does not exist, and for a value that is left open."""
    known = [field.name for field in fields(RootConfig)]
    for key in map(str, values):
        if key not in known:
            raise ConfigError(f"unknown setting '{key}'{nearest(key, known)}; conf/train.yaml lists the root settings")
    for key in missing_keys(values):
        raise ConfigError(f"{key} is not set, and has no default: give {key}=…")


def _check_plain(path: str, value: Any) -> None:
    """Raise `ConfigError` for what no setting can be, in dicts and lists too: nan, 30 digits, NUL in a text."""
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
    """Return Hydra's complaint about one of the overrides as an error of ours, with the nearest name that there is."""
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
            hint, where = nearest(rest.rpartition(".")[2], _group_keys(root)), f"conf/{root}/ has what its files set"
        elif (group := root.partition("/")[0]) in known and (conf_directory() / root).is_dir():
            hint, where = "", f"it is chosen with {_choices_with(root)}"
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
        return ConfigError(f"{group}={name} does not exist{_meant(group, name, options)}")
    return ConfigError(text)


def _meant(group: str, name: str, options: list[str]) -> str:
    """Say what a name that is no choice of a group may mean: a choice of one of its parts, or the nearest name."""
    for file in sorted((conf_directory() / group).glob("*/*.yaml")):
        part = f"{group}/{file.parent.name}"
        if name == file.stem:
            return f": {part}={name} does, and is chosen with {_choices_with(part)}"
        for option in options:
            if name in (f"{option}_{file.stem}", f"{file.stem}_{option}"):
                return f" (did you mean '{group}={option} {part}={file.stem}'?)"
    return f"{nearest(name, options)}; there are {', '.join(options)}"


def _choices_with(part: str) -> str:
    """Return the choices of a group whose defaults lists have a part, as an override: data=prompts, text, ..."""
    group, _, key = part.partition("/")

    def has_part(name: str) -> bool:
        path = conf_directory() / group / f"{name}.yaml"
        defaults = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []) if path.is_file() else []
        return any(key in one if isinstance(one, dict) else has_part(one) for one in defaults)

    files = sorted((conf_directory() / group).glob("*.yaml"))
    return f"{group}={', '.join(file.stem for file in files if has_part(file.stem))}"


def _group_keys(group: str) -> set[str]:
    """Return every key in the files of a group."""

    def keys(node: Any) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield str(key)
            yield from keys(value)

    files = (conf_directory() / group).rglob("*.yaml")
    return {key for file in files for key in keys(yaml.safe_load(file.read_text(encoding="utf-8")))}


def _type_error(error: Exception) -> ConfigError:
    """Return OmegaConf's complaint about a root setting's type as an error of ours."""
    text = " ".join(str(error).split())
    if found := re.search(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+) full_key: (\S+)", text):
        value, kind, wanted, key = found.groups()
        names = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "a text"}
        return ConfigError(f"{key}={value} is a {kind}; {names.get(wanted, wanted)} is allowed")
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
    if root["schedule"] not in SCHEDULES:
        raise ConfigError(
            f"schedule={root['schedule']} is not one of {', '.join(SCHEDULES)}{nearest(root['schedule'], SCHEDULES)}"
        )
    if len(root["betas"]) != 2 or not all(0 <= beta < 1 for beta in root["betas"]):
        raise ConfigError(f"betas={root['betas']} must be two numbers in [0, 1)")


def _check_group(group: str, node: dict[str, Any]) -> None:
    if group == "reward":
        if not isinstance(node, dict):
            raise ConfigError(f"reward={node!r} is not a group choice; see the files under conf/reward/")
        for name, reward in node.items():
            _check_node(f"reward.{name}", reward, given=GIVEN[group], read=READ_BY_BUILD[group])
    else:
        _check_node(group, node, given=GIVEN[group], read=READ_BY_BUILD.get(group, {}))


def _check_node(path: str, node: Any, *, given: list[str], read: dict[str, Any]) -> None:
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
        parameters = inspect.signature(target).parameters
    except Exception as error:  # hydra wraps import errors of every kind
        why = " ".join(str(error).split())  # one line: the last of stderr names the key
        raise ConfigError(f"{path}._target_={node['_target_']} cannot be used: {why}") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    hints = _hints(target) | read
    for key, value in node.items():
        if key in _HYDRA_KEYS:
            continue
        if key in given:
            raise ConfigError(f"{path}.{key} cannot be set: it is handed in by the run")
        if key not in named and key not in read and not takes_any:
            settable = [name for name in [*named, *read] if name not in given and name != "self"]
            if node.get("_partial_"):  # what has no default is a tensor, handed in at each call
                settable = [n for n in settable if n in node or parameters[n].default is not inspect.Parameter.empty]
            raise ConfigError(
                f"unknown setting '{path}.{key}'{nearest(key, settable)}{_taken_by(node['_target_'], key)}; "
                f"allowed: {', '.join(settable) or 'none'}"
            )
        if key in hints:
            _check_type(f"{path}.{key}", value, hints[key])
    required = [name for name in named if parameters.get(name) and parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in required if name not in node and name not in given]
    if missing and not node.get("_partial_"):
        raise ConfigError(f"{path}.{missing[0]} is not set, and has no default")
    for key, value in node.items():
        options = _options(hints.get(key))
        is_open = value is None and type(None) in options
        if (any(map(_is_node, options)) and not is_open) or (isinstance(value, dict) and "_target_" in value):
            _check_node(f"{path}.{key}", value, given=[], read={})


def _taken_by(target: str, key: str) -> str:
    """Say which files beside that of `target` take a setting that it does not, such as another surrogate's clip."""
    files = sorted(conf_directory().rglob("*.yaml"))
    targets = {file: yaml.safe_load(file.read_text(encoding="utf-8")).get("_target_") for file in files}
    group = next((file.parent for file in files if targets[file] == target), None)
    beside = {file.stem: one for file, one in targets.items() if one and file.parent == group}
    others = [name for name, one in beside.items() if key in inspect.signature(get_method(one)).parameters]
    if group is None or not others:
        return ""
    choices = f"{group.relative_to(conf_directory()).as_posix()}={', '.join(others)}"
    return f": {target.rpartition('.')[2]} does not take it, {choices} would"


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:  # annotations that exist for the type checker only
        return {}


def _is_node(hint: Any) -> bool:
    """Whether what has this annotation is made from a node with a _target_: an object of ours, or a function."""
    is_ours = inspect.isclass(hint) and hint.__module__.startswith("rlft.")
    return hint is NODE or is_ours or typing.get_origin(hint) is collections.abc.Callable


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _check_type(path: str, value: Any, hint: Any) -> None:
    """Check values of plain types (str, int, float, bool, None, unions of them, and ranges of numbers) only."""
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
        if isinstance(limits, Range) and value is not None and (refusal := limits.refusal(value)):
            raise ConfigError(f"{path}={value} must be {refusal}")
