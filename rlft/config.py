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
import sys
import types
import typing
from dataclasses import dataclass, fields
from typing import Any

from hydra.errors import OverrideParseException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlft.errors import ConfigError, nearest
from rlft.trainer.schedule import SCHEDULES


@dataclass(frozen=True)
class RootSettings:
    """The root settings; `conf/train.yaml` says what each means and holds its default."""

    name: str
    seed: int
    run_dir: str | None
    resume: bool
    dry_run: bool
    steps: int
    max_minutes: float | None
    max_tokens: int | None
    patience: int | None
    prompts_per_step: int
    group_size: int
    micro_batch: int | None
    micro_batch_tokens: int | None
    rollout_rows: int | None
    max_new_tokens: int
    temperature: float
    learning_rate: float
    warmup_steps: int
    schedule: str
    final_learning_rate_fraction: float
    max_grad_norm: float
    weight_decay: float
    betas: tuple[float, float]
    eval_every: int
    eval_prompts: int
    save_every: int
    keep: int
    log_every: int
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
_HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
_AT_LEAST_ONE = ("prompts_per_step", "group_size", "max_new_tokens", "eval_prompts", "keep", "log_every",
                 "micro_batch", "micro_batch_tokens", "rollout_rows", "max_tokens", "patience")  # fmt: skip
_AT_LEAST_ZERO = ("seed", "steps", "warmup_steps", "eval_every", "save_every", "weight_decay",
                  "final_learning_rate_fraction")  # fmt: skip
_ABOVE_ZERO = ("temperature", "learning_rate", "max_grad_norm", "max_minutes")
_FINITE = ("temperature", "learning_rate")


def checked(config: DictConfig) -> RootConfig:
    """Return the composed configuration as plain values; raises `ConfigError` naming the key that is wrong."""
    known = [field.name for field in fields(RootConfig)]
    for key in map(str, config):
        if key not in known:
            raise ConfigError(
                f"unknown setting '{key}'{nearest(str(key), known)}; conf/train.yaml lists the root settings"
            )
    for key in missing_keys(OmegaConf.to_container(config, resolve=False)):
        raise ConfigError(f"{key} is not set, and has no default: give {key}=…")
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        root = {k: v for k, v in values.items() if k not in GIVEN}
        for key in ("resume", "dry_run"):  # OmegaConf takes any number for a bool
            if key in root:
                _check_type(key, root[key], bool)
        merged = OmegaConf.merge(OmegaConf.structured(RootSettings), root)
        typed: Any = OmegaConf.to_container(merged, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    _check_ranges(typed)
    groups: dict[str, Any] = {group: values.get(group) or {} for group in GIVEN}
    for group, node in groups.items():
        _check_group(group, node)
    return RootConfig(**(typed | groups | {"betas": tuple(typed["betas"])}))


def missing_keys(node: Any, prefix: str = "") -> list[str]:
    """Return the keys that are left open, as ???, in an unresolved configuration."""
    if node == "???":
        return [prefix]
    if not isinstance(node, dict):
        return []
    return [key for name, part in node.items() for key in missing_keys(part, f"{prefix}.{name}" if prefix else name)]


def composition_error(error: Exception) -> ConfigError:
    """Return Hydra's complaint about an override as an error of ours, with the nearest name that there is."""
    text = " ".join(str(error).split())
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override} is not an override: {text}")
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
        root, _, rest = key.partition(".")
        known = [field.name for field in fields(RootConfig)]
        hint = nearest(root, known) if root not in known else ""
        where = f"conf/{root}/ has what its files set" if rest and root in known else "conf/train.yaml lists them"
        return ConfigError(f"unknown setting '{key}'{hint}; {where}")
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.*?)(?: Config search|$)", text
    ):
        group, name, options = found[1], found[2], found[3].split()
        return ConfigError(f"{group}={name} does not exist{nearest(name, options)}; there are {', '.join(options)}")
    return ConfigError(text)


def _check_ranges(root: dict[str, Any]) -> None:
    for names, is_allowed, allowed in (
        (_AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
        (_AT_LEAST_ZERO, lambda x: x >= 0, "at least 0"),
        (_ABOVE_ZERO, lambda x: x > 0, "above 0"),
        (_FINITE, math.isfinite, "finite"),
    ):
        for name in names:
            if root[name] is not None and not is_allowed(root[name]):
                raise ConfigError(f"{name}={root[name]} must be {allowed}")
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
                f"unknown setting '{path}.{key}'{nearest(key, settable)}{_taken_by(target, key)}; "
                f"allowed: {', '.join(settable) or 'none'}"
            )
        if key in hints:
            _check_type(f"{path}.{key}", value, hints[key])
    required = [name for name in named if parameters.get(name) and parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in required if name not in node and name not in given]
    if missing and not node.get("_partial_"):
        raise ConfigError(f"{path}.{missing[0]} is not set, and has no default")
    for key, value in node.items():
        if hints.get(key) is NODE or (isinstance(value, dict) and "_target_" in value):
            _check_node(f"{path}.{key}", value, given=[], read={})


def _taken_by(target: Any, key: str) -> str:
    """Say which public functions beside `target` take a setting that it does not, such as another surrogate's clip."""
    beside = vars(sys.modules[target.__module__]).items()
    others = [
        name
        for name, other in beside
        if inspect.isfunction(other) and other.__module__ == target.__module__ and not name.startswith("_")
        and key in inspect.signature(other).parameters
    ]  # fmt: skip
    return f": {target.__name__} does not take it, {' and '.join(others)} would" if others else ""


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # annotations that exist for the type checker only
        return {}
    return {name: NODE if _is_node(hint) else hint for name, hint in hints.items()}


def _is_node(hint: Any) -> bool:
    is_ours = inspect.isclass(hint) and hint.__module__.startswith("rlft.")
    return is_ours or typing.get_origin(hint) is collections.abc.Callable


def _check_type(path: str, value: Any, hint: Any) -> None:
    """Check values of plain types (str, int, float, bool, None and unions of them); leave other annotations alone."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if not set(options) <= {str, int, float, bool, type(None)}:
        return
    allowed = tuple(options) + ((int,) if float in options else ())
    is_stray_bool = isinstance(value, bool) and bool not in options
    if not isinstance(value, allowed) or is_stray_bool:
        names = " or ".join("null" if option is type(None) else option.__name__ for option in options)
        raise ConfigError(f"{path}={value!r} is a {type(value).__name__}; {names} is allowed")


def run_config(run_dir, *, trusted=()):
    import yaml

    return checked(OmegaConf.create(yaml.safe_load((run_dir / "config.yaml").read_text())))
