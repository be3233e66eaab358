"""The tree of docs/architecture.md is the repository's."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tree() -> set[str]:
    """The paths that the tree names, each with a phrase behind it."""
    lines = (ROOT / "docs" / "architecture.md").read_text().split("## The tree", 1)[1].splitlines()
    paths, folders = set(), []
    for line in lines:
        if not line.startswith("    ") or line.startswith(" " * 16):  # a phrase that goes on
            continue
        name, *phrase = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        folders = [*folders[:depth], name]
        if name.endswith(("/", "train.yaml")) and not phrase:
            continue
        assert phrase, f"{name} has no phrase"
        folders[-1] = "conf/" if name == "conf/train.yaml" else name
        paths.add("".join(folders[:-1]) + name)
    return paths


def test_every_module_stands_in_the_tree():
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rlft").rglob("*.py") if path.name != "__init__.py"}
    assert modules - tree() == set()


def test_everything_in_the_tree_exists():
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_every_choice_of_a_group_stands_in_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text().split("## The tree", 1)[1].split("    rlft/", 1)[0]
    folders = [path for path in (ROOT / "conf").iterdir() if path.is_dir()]
    named = {folder.name: set(re.split(r"[,\s]+", entry(text, folder.name))) for folder in folders}
    missing = [
        f"{folder.name}/{choice.stem}"
        for folder in folders
        for choice in folder.glob("*.yaml")
        if choice.stem not in named[folder.name] | {"policy_gradient"}  # what online algorithms share
    ]
    assert missing == []


def entry(text: str, name: str) -> str:
    """What stands behind a folder's name, over its continued lines."""
    return re.split(r"\n {6,8}\S", text.split(f"      {name}/ ", 1)[1])[0]
