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
from rlft.data.kinds import Kind, check_kind
from rlft.models.gpt2 import GPT2
from tests.test_config import composed

ALGORITHMS = sorted(path.stem for path in (build.CONF / "algo").glob("*.yaml") if path.stem != "policy_gradient")
DATA = sorted(path.stem for path in (build.CONF / "data").glob("*.yaml"))
# Of all others, which sample: what their names begin with.
OFFLINE = {
    "sft": ("reviews_text", "shakespeare_text", "text_file", "completions_"),
    "denoise": ("reviews_text", "shakespeare_text", "text_file"),
    "classification": ("labelled_", "reviews_labelled"),
    "kto": ("unpaired_",),
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "reward_model"), ("preferences_",)),
}
GIVEN = tuple(name for names in OFFLINE.values() for name in names)


@functools.cache
def target(group: str, name: str) -> type:
    """The class of a YAML, or of the one that it begins with; to compose each takes half a minute."""
    node = yaml.safe_load((build.CONF / group / f"{name}.yaml").read_text())
    return get_class(node["_target_"]) if "_target_" in node else target(group, node["defaults"][0])


def reads(algo: str) -> list[str]:
    return [
        name for name in DATA if (name.startswith(OFFLINE[algo]) if algo in OFFLINE else not name.startswith(GIVEN))
    ]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_algorithm_takes_what_it_reads_and_refuses_all_else_naming_what_it_would_take(algo):
    for data in DATA:
        if data in reads(algo):
            check_kind(target("algo", algo), target("data", data))
            continue
        with pytest.raises(ConfigError) as refused:
            check_kind(target("algo", algo), target("data", data))
        taken, _, given = str(refused.value).partition("; data (")
        assert sorted(set(re.findall(r"\w+", taken)) & set(DATA)) == reads(algo)
        assert given.startswith(f"{target('data', data).__name__}) holds ")


def test_the_choices_that_messages_name_are_the_files():
    assert sorted(name for kind in Kind for name in kind.choices) == DATA
    for kind in Kind:
        assert {target("data", name).kind for name in kind.choices} == {kind}


def test_pairs_for_a_file_are_ranked_from_prompts_alone():
    from rlft.algos.online.rank_pairs import RankPairs

    check_kind(RankPairs, target("data", "reviews"))
    with pytest.raises(ConfigError, match=r"algo \(RankPairs\) reads prompts .*data \(TextData\) holds plain text"):
        check_kind(RankPairs, target("data", "reviews_text"))


def test_a_data_set_of_ones_own_says_its_kind():
    own = type("Own", (), {"kind": Kind.PROMPTS})
    check_kind(target("algo", "grpo"), own)
    with pytest.raises(ConfigError, match=r"data \(SimpleNamespace\) does not say by `kind` which rlft\.data\.kinds"):
        check_kind(target("algo", "grpo"), SimpleNamespace)


@pytest.mark.parametrize(
    ("algo", "data", "message"),
    [
        ("grpo", "completions_sums", r"reads prompts \(data=reviews, .*holds prompts with completions"),
        ("online_dpo", "preferences_jsonl", r"reads prompts \(data=reviews, .*holds pairs of a chosen"),
        ("sft", "preferences_jsonl", r"plain text \(data=reviews_text, .*completions_jsonl.*holds pairs of a chosen"),
        ("sft", "unpaired_jsonl", r"holds completions with a label"),
        ("sft", "reviews", r"data \(PromptData\) holds prompts$"),
    ],
)
def test_a_run_is_refused_before_its_data_and_weights_are_read(algo, data, message, monkeypatch, tmp_path: Path):
    def load(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(GPT2, "from_pretrained", load)
    path = (f"data.source.path={tmp_path / 'missing.jsonl'}",) if data.endswith("jsonl") else ()
    settings = checked(composed(f"algo={algo}", f"data={data}", "hardware=cpu", "tracker=none", *path))
    with pytest.raises(ConfigError, match=message):
        build.build(settings)
