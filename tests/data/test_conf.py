from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
KINDS = ("preferences", "completions", "unpaired", "labelled")
FORMATS = ("jsonl", "csv", "parquet", "huggingface")
# Openings have one length and tasks are short, so nothing can be too long; tasks are the same for every seed.
TASKS = ("sums", "sort", "recite")
LEFT_OUT = {name: {"max_prompt_tokens", "on_long"} for name in ("reviews", "shakespeare", *TASKS)}


@pytest.mark.parametrize("name", NAMES)
def test_yaml_shows_every_knob_of_its_classes_and_no_other(name):
    (data, *parts) = _nodes(_composed(name))
    assert _knobs(data) - {"tokenizer"} == _keys(data) | LEFT_OUT.get(name, set())
    for part in parts:
        assert _knobs(part) - {"tokenizer"} == _keys(part) | (
            {"num", "seed"} if name.removeprefix("completions_") in TASKS else set()
        )


def test_there_is_a_yaml_for_each_source():
    names = "csv huggingface jsonl parquet reviews reviews_text reviews_labelled shakespeare shakespeare_text text_file"
    assert {*names.split(), *(f"{kind}_{form}" for kind in KINDS for form in FORMATS)} <= set(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_formats_differ_in_nothing_but_the_source(kind):
    first, *others = (_composed(f"{kind}_{form}") for form in FORMATS)
    for other in others:
        assert other | {"source": None} == first | {"source": None}
        assert other["source"]["_target_"] != first["source"]["_target_"]
        assert {key: other["source"][key] for key in first["source"] if key != "_target_"} == {
            key: value for key, value in first["source"].items() if key != "_target_"
        }


def _composed(name: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(overrides=[f"+data={name}"]))
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
