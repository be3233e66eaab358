"""Every algorithm with every data set: what it reads is built, and all else is refused before anything is loaded."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.utils import get_class

from rlft import build
from rlft.config import checked
from rlft.core.errors import ConfigError
from rlft.data.kinds import Kind, check_columns, check_kind
from rlft.data.reviews import Reviews
from rlft.models.gpt2 import GPT2
from tests.test_config import composed

ALGORITHMS = sorted(path.stem for path in (build.CONF / "algo").glob("*.yaml") if path.stem != "policy_gradient")
DATA = sorted(path.stem for path in (build.CONF / "data").glob("*.yaml"))
ONLINE = ("contexts", "prompts", "reviews", "shakespeare")  # what all others read
OFFLINE = {
    "sft": ("completions", "text"),
    "denoise": ("text",),
    "classification": ("labelled", "reviews_labelled"),
    "kto": ("unpaired",),
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "reward_model"), ("preferences",)),
}


@functools.cache
def target(group: str, name: str) -> type:
    """The class of a YAML, or of the one that it begins with; to compose each takes half a minute."""
    node = yaml.safe_load((build.CONF / group / f"{name}.yaml").read_text())
    return get_class(node["_target_"]) if "_target_" in node else target(group, node["defaults"][0])


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_algorithm_takes_what_it_reads_and_refuses_all_else_naming_what_it_would_take(algo):
    reads = sorted(OFFLINE.get(algo, ONLINE))
    for data in DATA:
        if data in reads:
            check_kind(target("algo", algo), target("data", data))
            continue
        with pytest.raises(ConfigError) as refused:
            check_kind(target("algo", algo), target("data", data))
        taken, _, given = str(refused.value).partition("; data (")
        assert sorted(re.split(", (?!or)", ", ".join(re.findall(r"\(data=(.+?)\)", taken)))) == reads
        assert given.startswith(f"{target('data', data).__name__}) holds ")


def test_the_choices_that_messages_name_are_the_files():
    assert sorted(name for kind in Kind for name in kind.choices) == DATA
    for kind in Kind:
        assert {target("data", name).kind for name in kind.choices} == {kind}


def test_pairs_for_a_file_are_ranked_from_prompts_alone():
    from rlft.algos.online.rank_pairs import RankPairs

    check_kind(RankPairs, target("data", "reviews"))
    with pytest.raises(ConfigError, match=r"algo \(RankPairs\) reads prompts .*data \(TextData\) holds plain text"):
        check_kind(RankPairs, target("data", "text"))


def test_a_data_set_of_ones_own_says_its_kind():
    own = type("Own", (), {"kind": Kind.PROMPTS})
    check_kind(target("algo", "grpo"), own)
    with pytest.raises(ConfigError, match=r"data \(SimpleNamespace\) does not say by `kind` which rlft\.data\.kinds"):
        check_kind(target("algo", "grpo"), SimpleNamespace)


@pytest.mark.parametrize(
    ("algo", "data", "message"),
    [
        ("grpo", "completions", r"reads prompts \(data=reviews, .*holds prompts with completions"),
        ("online_dpo", "preferences", r"reads prompts \(data=reviews, .*holds pairs of a chosen"),
        ("sft", "preferences", r"plain text \(data=text\), or .*\(data=completions\).*holds pairs of a chosen"),
        ("sft", "unpaired", r"holds completions with a label"),
        ("sft", "reviews", r"data \(PromptData\) holds prompts$"),
    ],
)
def test_a_run_is_refused_before_its_data_and_weights_are_read(algo, data, message, monkeypatch, tmp_path: Path):
    def load(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(GPT2, "from_pretrained", load)
    path = (f"data.source.path={tmp_path / 'missing.jsonl'}",) if data != "reviews" else ()
    settings = checked(composed(f"algo={algo}", f"data={data}", "hardware=cpu", "tracker=none", *path))
    with pytest.raises(ConfigError, match=message):
        build.build(settings)


def test_columns_that_a_source_never_has_are_refused_and_all_else_is_not():
    held = {"completion_column": "label", "max_tokens": None}
    check_columns(held, Reviews)
    check_columns(held | {"completion_column": "mine"}, SimpleNamespace)  # a class that does not say which it has
    with pytest.raises(ConfigError, match=r"^data\.chosen_column=chosen: .*Reviews.* has only label, source;"):
        check_columns(held | {"chosen_column": "chosen"}, Reviews)
