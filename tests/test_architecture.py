"""The tree of docs/architecture.md is the repository's."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

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
        if name == "rlft/":
            continue
        assert phrase, f"{name} has no phrase"
        paths.add("".join(folders[:-1]) + name)
    return paths


def test_every_module_stands_in_the_tree():
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rlft").rglob("*.py") if path.name != "__init__.py"}
    rewards = {path for path in modules if path.startswith("rlft/rewards/")}  # the tree says: one file for each
    yamls = [yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "data" / "source").glob("*.yaml")]
    sources = {f"{node['_target_'].rpartition('.')[0].replace('.', '/')}.py" for node in yamls if "_target_" in node}
    assert modules - rewards - sources - tree() == set()


def test_everything_in_the_tree_exists():
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_every_group_of_the_configuration_stands_in_the_tree():
    groups = {f"conf/{path.name}/" for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert groups - tree() == set()


def test_every_link_leads_to_a_file():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page
