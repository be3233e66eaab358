"""What the files under conf/ offer, for messages that name what a person may have meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from hydra.utils import get_method

from rlft.core.errors import nearest
from rlft.core.paths import conf_directory
from rlft.core.settings import parameters_of


def meant(group: str, name: str, options: list[str]) -> str:
    """Say what a name that is no choice of a group may mean: a choice of one of its parts, or the nearest name."""
    for file in sorted((conf_directory() / group).glob("*/*.yaml")):
        part = f"{group}/{file.parent.name}"
        if name == file.stem:
            return f": {part}={name} does, and is chosen with {choosing(part)}"
        for option in options:
            if name in (f"{option}_{file.stem}", f"{file.stem}_{option}"):
                return f" (did you mean '{group}={option} {part}={file.stem}'?)"
    return f"{nearest(name, options)}; there are {', '.join(options)}"


def choosing(part: str) -> str:
    """Return the choices of a group whose defaults lists have a part, as an override: data=prompts, text, ..."""
    group, _, key = part.partition("/")

    def has_part(name: str) -> bool:
        path = conf_directory() / group / f"{name}.yaml"
        defaults = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []) if path.is_file() else []
        return any(key in one if isinstance(one, dict) else has_part(one) for one in defaults)

    files = sorted((conf_directory() / group).glob("*.yaml"))
    return f"{group}={', '.join(file.stem for file in files if has_part(file.stem))}"


def keys_of(group: str) -> set[str]:
    """Return every key in the files of a group."""

    def keys(node: Any) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield str(key)
            yield from keys(value)

    files = (conf_directory() / group).rglob("*.yaml")
    return {key for file in files for key in keys(yaml.safe_load(file.read_text(encoding="utf-8")))}


def taken_by(target: str, key: str) -> str:
    """Say which files beside that of `target` take a setting that it does not, such as another surrogate's clip."""
    files = sorted(conf_directory().rglob("*.yaml"))
    targets = {file: yaml.safe_load(file.read_text(encoding="utf-8")).get("_target_") for file in files}
    group = next((file.parent for file in files if targets[file] == target), None)
    beside = {file.stem: one for file, one in targets.items() if one and file.parent == group}
    others = [name for name, one in beside.items() if key in parameters_of(get_method(one))]
    if group is None or not others:
        return ""
    choices = f"{group.relative_to(conf_directory()).as_posix()}={', '.join(others)}"
    return f": {target.rpartition('.')[2]} does not take it, {choices} would"
