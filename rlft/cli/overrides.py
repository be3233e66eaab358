"""Changes the settings of a run by a command line: `rlft eval RUN eval_prompts=64 reward=length`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlft.config import GROUPS, RootConfig, checked, composition_error
from rlft.core.errors import ConfigError, nearest
from rlft.core.paths import conf_directory


def changed(run: RootConfig | None, overrides: list[str]) -> RootConfig:
    """Return a run's settings (the defaults for None), changed by the overrides of a command line.

    An override chooses a group (reward=length; or with its parts: data=prompts data/source=csv), or sets a root setting
    or a dotted key in a group.

    Raises `ConfigError` for any other override, and for settings that `rlft.config.checked` refuses.
    """
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            if run is None:
                return checked(_composed(["name=eval", *overrides]))
            values: Any = OmegaConf.create(asdict(run))
            OmegaConf.set_struct(values, True)
            parsed = OverridesParser.create().parse_overrides(overrides)
            for override in parsed:
                _change(values, override, parsed)
            return checked(values)
    except (HydraException, OmegaConfBaseException) as error:
        raise composition_error(error) from error


def _composed(overrides: list[str]) -> DictConfig:
    try:
        return compose("train", overrides=overrides)
    except (ValueError, TypeError) as error:  # raised by Hydra if a group is set to a number
        raise composition_error(error, overrides=overrides) from error


def _change(values: DictConfig, override: Any, overrides: list[Any]) -> None:
    key = override.key_or_group
    group, _, part = key.partition("/")
    is_alone = bool(part) and group not in [one.key_or_group for one in overrides]
    if override.is_sweep_override() or override.is_add() or override.is_delete() or is_alone:
        raise ConfigError(f"{override.input_line}: a setting is changed by KEY=VALUE, or a whole group by GROUP=NAME")
    if part:  # was composed with its group
        return
    if key in GROUPS:
        parts = [one.input_line for one in overrides if one.key_or_group.startswith(f"{key}/")]
        values[key] = _composed([override.input_line, *parts])[key]
        return
    group, _, inner = key.rpartition(".")
    node: Any = OmegaConf.select(values, group) if group else values
    known = [str(name) for name in node] if isinstance(node, DictConfig) else []
    if inner not in known:
        raise ConfigError(f"unknown setting '{key}'{nearest(inner, known)}; allowed here: {', '.join(known) or 'none'}")
    node[inner] = override.value()
