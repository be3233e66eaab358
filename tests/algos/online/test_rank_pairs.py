"""Pairs that a reward ranked: what is written, twice the same, and readable by the data set of pairs."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rlft import build
from rlft.algos.online.rank_pairs import RankPairs
from rlft.config import checked
from rlft.core.errors import ConfigError, RewardError
from rlft.data.files import Jsonl
from rlft.data.preferences import PreferenceData
from tests.builders import ALPHABET, TOKENIZER, FixedPrompts, reward_sum, run_of, share_of_a, tiny

ROOT = Path(__file__).parents[3]
PROMPTS = [a + b for a in ALPHABET[:4] for b in ALPHABET[:4]]


def made(path: Path | str, *, reward=share_of_a, num_pairs: int = 20, **changes) -> RankPairs:
    settings = {"max_new_tokens": 6, "prompts_per_step": 8, "group_size": 4} | changes
    run = run_of(tiny(1), FixedPrompts(PROMPTS), rewards=reward_sum(reward), **settings)
    node = {"_target_": f"{RankPairs.__module__}.{RankPairs.__name__}", "path": str(path), "num_pairs": num_pairs}
    return build.algorithm(node, run)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_are_the_best_and_the_worst_of_their_group(tmp_path):
    ranker = made(tmp_path / "pairs.jsonl")
    found, rows = ranker.write(), read(tmp_path / "pairs.jsonl")
    assert len(rows) == found["pairs"] == 20 and found["groups"] >= 24
    first = ranker.rollouts(0)
    rewards, texts = first.total.tolist(), TOKENIZER.decode_batch(first.rollout.completions())
    ends, expected = [reason == "stop" for reason in first.rollout.finish_reasons], []
    for p, prompt in enumerate(first.prompts):
        group = list(zip(*(x[4 * p : 4 * p + 4] for x in (rewards, texts, ends)), strict=True))
        high, low = max(group, key=lambda one: one[0]), min(group, key=lambda one: one[0])
        if high[0] > low[0] and high[1:] != low[1:]:
            expected.append((prompt.text, high[1], low[1], high[2], low[2], high[0], low[0]))
    names = ("prompt", "chosen", "rejected", "chosen_ends", "rejected_ends", "score_chosen", "score_rejected")
    assert [tuple(row[name] for name in names) for row in rows[: len(expected)]] == expected
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert found["score_chosen"] == pytest.approx(sum(row["score_chosen"] for row in rows) / 20)


def test_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made(tmp_path / name, seed=seed).write()
    texts = [(tmp_path / name).read_bytes() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_pairs_are_read_by_the_data_set_of_pairs(tmp_path):
    made(tmp_path / "pairs.jsonl").write()
    data = PreferenceData(Jsonl(str(tmp_path / "pairs.jsonl"), validation=0.3), tokenizer=TOKENIZER)
    assert data.counts["train_examples"] + data.counts["validation_examples"] > 10
    rows = {(row["prompt"], row["chosen"], row["rejected"]): row for row in read(tmp_path / "pairs.jsonl")}
    ends = set()
    for example in data.examples("train"):
        columns = example.prompt.columns
        row = rows[example.prompt.text, columns["chosen"], columns["rejected"]]
        for name, ids in zip(("chosen", "rejected"), example.completions, strict=True):
            assert (ids[-1] == TOKENIZER.eos_id) == row[f"{name}_ends"]
            ends.add(row[f"{name}_ends"])
    assert ends == {True, False}


def test_reward_without_spread_is_an_error_and_leaves_no_file(tmp_path):
    ranker = made(
        tmp_path / "pairs.jsonl", reward=lambda completions, **_: [1.0] * len(completions), prompts_per_step=250
    )
    with pytest.raises(RewardError, match="only 0 of 500 groups differ in their reward"):
        ranker.write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "/nowhere/pairs.jsonl"}, "must be a new file in a directory that exists"),
        ({"path": __file__}, "must be a new file"),
        ({"num_pairs": 0}, "algo.num_pairs=0 must be at least 1"),
        ({"group_size": 1}, "group_size=1 at least 2"),
        ({"world_size": 2}, "written by one process"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        made(**({"path": tmp_path / "pairs.jsonl"} | changes))


def test_its_yaml_shows_every_knob_and_passes_the_check():
    with initialize_config_dir(str(build.CONF), version_base="1.3"):
        config = checked(compose("rank_pairs", overrides=["algo.path=pairs.jsonl"]))
    assert set(inspect.signature(RankPairs).parameters) - set(config.algo) == {"run"}
    assert (config.name, config.prompts_per_step, config.algo["num_pairs"]) == ("rank_pairs", 64, 4000)


def test_command_writes_pairs_and_names_what_is_wrong(tmp_path):
    prompts, reward = tmp_path / "prompts.jsonl", tmp_path / "mine.py"
    prompts.write_text("".join(json.dumps({"prompt": f"film {i}"}) + "\n" for i in range(40)))
    reward.write_text("def score(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    command = [
        sys.executable, "-m", "rlft", "rank", "model=gpt2_scratch", "model.n_layer=1", "model.n_embd=16",
        "model.n_head=2", "model.n_positions=32", "model.tokenizer.vocab_size=260", "data=prompts",
        f"data.source.path={prompts}", "reward=custom", f"reward.custom.function={reward}:score", "hardware=cpu",
        "hardware.num_threads=1", "max_new_tokens=4", "group_size=3", "prompts_per_step=4", "algo.num_pairs=6",
        f"algo.path={tmp_path / 'pairs.jsonl'}",
    ]  # fmt: skip
    env = os.environ | {"RLFT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"rlft: {tmp_path / 'pairs.jsonl'}: pairs 6, groups ")
    assert len(read(tmp_path / "pairs.jsonl")) == 6
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env, cwd=tmp_path)
    assert again.returncode == 2 and "must be a new file" in again.stderr
