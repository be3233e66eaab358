from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_shows_every_knob_of_its_classes_and_no_other(path):
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert _knobs(config["_target_"]) - {"tokenizer"} == config.keys() - {"_target_"} | _left_out(path.stem)
    assert _knobs(config["source"]["_target_"]) == config["source"].keys() - {"_target_"}


def test_there_is_a_yaml_for_each_source():
    names = "csv huggingface jsonl parquet reviews reviews_text shakespeare shakespeare_text text_file"
    assert [path.stem for path in sorted(CONF.glob("*.yaml"))] == names.split()


def _knobs(target: str) -> set[str]:
    return set(inspect.signature(get_class(target)).parameters)


def _left_out(name: str) -> set[str]:
    """Openings have one length, so nothing can be too long."""
    return {"max_prompt_tokens", "on_long"} if name in ("reviews", "shakespeare") else set()
