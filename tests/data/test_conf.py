from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from rlft.data.kinds import TABLES
from rlft.data.records import RecordSource

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
SOURCES = sorted(path.stem for path in (CONF / "data" / "source").glob("*.yaml"))
TASKS = ("recite", "sort", "sums")
# The choices of data= that let a source be chosen, with the sources that go with them.
CHOICES = {
    "prompts": SOURCES,
    "text": SOURCES,
    "contexts": SOURCES,
    "completions": [*TABLES, *TASKS],
    "preferences": TABLES,
    "unpaired": TABLES,
    "labelled": TABLES,
}
PAIRS = [(kind, source) for kind, sources in CHOICES.items() for source in sources]
ALONE = [(name, None) for name in NAMES if name not in CHOICES]
OPENINGS = ("reviews", "shakespeare")  # their prompts have one length, so none can be too long


@pytest.mark.parametrize(("name", "source"), [*ALONE, *PAIRS])
def test_yaml_shows_every_knob_of_its_classes_and_no_other(name, source):
    (data, *parts) = _nodes(_composed(name, source))
    left_out = {"max_prompt_tokens", "on_long"} if name in OPENINGS else set()
    assert _knobs(data) - {"tokenizer"} == _keys(data) | left_out
    for part in parts:  # tasks are the same for every seed
        assert _knobs(part) == _keys(part) | ({"num", "seed"} if source in TASKS else set())


@pytest.mark.parametrize("kind", CHOICES)
def test_only_the_source_depends_on_the_choice_of_the_source(kind):
    nodes = {source: _composed(kind, source) for source in CHOICES[kind]}
    rest = [node | {"source": None} for node in nodes.values()]
    assert all(node == rest[0] for node in rest)
    files = [nodes[name]["source"] for name in TABLES]
    for key in ("path", "prompt_column", "on_bad_row", "validation", "test"):
        assert len({str(source[key]) for source in files}) == 1


def test_tables_are_the_sources_whose_columns_are_the_users():
    classes = {name: get_class(_composed("prompts", name)["source"]["_target_"]) for name in SOURCES}
    assert {name for name, one in classes.items() if issubclass(one, RecordSource)} == set(TABLES)
    assert not any(hasattr(classes[name], "columns") for name in TABLES)


def _composed(name: str, source: str | None) -> dict[str, Any]:
    overrides = [f"+data={name}"] + ([f"data/source={source}"] if source else [])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(overrides=overrides))
    return config["data"]


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """The node and those inside it, the outermost first."""
    if isinstance(node, dict) and "_target_" in node:
        yield node
        for value in node.values():
            yield from _nodes(value)


def _keys(node: dict[str, Any]) -> set[str]:
    return node.keys() - {"_target_", "_partial_"}


def _knobs(node: dict[str, Any]) -> set[str]:
    return set(inspect.signature(get_class(node["_target_"])).parameters)
