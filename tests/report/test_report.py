from __future__ import annotations

import json
import math

import pytest

from rlft.cli import main as command
from rlft.core.errors import ConfigError
from rlft.report.markdown import at_kl, interval, results, samples
from rlft.report.runs import read_groups


def write_run(directory, *, name="held", seed=0, rewards=(0.0, 0.5), text="a | b\nc", **config):
    """Writes a finished run with two evaluations, at steps 0 and 10."""
    directory.mkdir(parents=True)
    evaluations = [{"eval/reward": r, "eval/kl_completion": 4 * r} for r in rewards]
    summary = {
        "name": name, "seed": seed, "commit": "abc", "hardware": "a machine", "seconds": 12.3,
        "versions": {"torch": "2", "python": "3"},
        "evaluation": {"before": evaluations[0], "after": evaluations[-1]},
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "config.yaml").write_text(json.dumps({"seed": seed, "name": name, "model": {"seed": seed}} | config))
    rows = [{"step": 10 * i, "num_tokens": 100 * i} | e for i, e in enumerate(evaluations)]
    rows.insert(1, {"step": 5, "reward": 0.1})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [
        {"step": 10 * i, "split": "eval", "prompt": f"p{p}", "completion": f"{text}{i}", "reward": r}
        for i, r in enumerate(rewards)
        for p in range(3)
    ]
    held_out.insert(0, {"step": 1, "prompt": "trained", "completion": "", "reward": 0.0})
    (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))


def test_interval_is_students_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])
    # s = 1, n = 3: t(0.975, 2 degrees of freedom) = 4.302653 (any table of Student's t), over sqrt(3)
    assert (mean, half) == (2.0, pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9))
    assert math.isnan(interval([1.0])[1])


def test_runs_of_one_name_are_seeds_of_one_group(tmp_path):
    for seed in (2, 0):
        write_run(tmp_path / f"a{seed}", seed=seed)
    write_run(tmp_path / "deep" / "b", name="free")
    groups = read_groups([tmp_path])
    assert {name: [run.seed for run in runs] for name, runs in groups.items()} == {"held": [0, 2], "free": [0]}
    assert [row["step"] for row in groups["held"][0].evaluations] == [0, 10]


def test_two_runs_of_one_seed_are_refused(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(ConfigError, match="both seed 0 of 'held'"):
        read_groups([tmp_path])


def test_runs_of_different_settings_are_no_seeds_of_one(tmp_path):
    write_run(tmp_path / "a", seed=0, learning_rate=1.0)
    write_run(tmp_path / "b", seed=1, learning_rate=2.0)
    with pytest.raises(ConfigError, match="differ in learning_rate"):
        read_groups([tmp_path])


def test_an_early_stopped_run_shows_its_last_samples(tmp_path):
    write_run(tmp_path / "a")
    with (tmp_path / "a" / "samples.jsonl").open("a") as file:  # of a second evaluation at the end
        for p in range(3):
            row = {"step": 10, "split": "eval", "prompt": f"p{p}", "completion": "best", "reward": None}
            file.write(json.dumps(row) + "\n")
    assert samples(read_groups([tmp_path]), 1).splitlines()[-1].endswith("| best |")


def test_a_path_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no summary\.json"):
        read_groups([tmp_path])
    assert command(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2


def test_results_hold_before_and_after_with_the_interval_over_seeds(tmp_path):
    for seed, after in enumerate((0.4, 0.6)):
        write_run(tmp_path / str(seed), seed=seed, rewards=(0.1, after))
    rows = results(read_groups([tmp_path]), ["eval/reward"]).splitlines()
    assert rows[2] == "| before training | | 0.100 |"
    # s = 0.1414, half-width 12.706 * 0.1 = 1.271
    assert rows[3] == "| held | 0, 1 | 0.500 ± 1.271 |"
    with pytest.raises(ConfigError, match="did you mean 'eval/reward'"):
        results(read_groups([tmp_path]), ["eval/rewrd"])


def test_samples_stand_side_by_side_and_break_no_table(tmp_path):
    write_run(tmp_path / "a", rewards=(0.0, 0.25, 0.5))
    table = samples(read_groups([tmp_path]), 2).splitlines()
    assert table[4:] == [rf"| p{p} | a \| b\nc0 (+0.00) | a \| b\nc2 (+0.50) |" for p in (0, 1)]


def test_the_command_writes_table_and_picture(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / str(seed), seed=seed)
    assert command(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--samples", "1"]) == 0
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| held | 0, 1 |" in text and "Commit abc; a machine" in text and "#### held, seed 0" in text
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| held | 0, 1 |" in capsys.readouterr().out


def test_reward_at_a_kl_lies_on_the_line_between_two_evaluations(tmp_path):
    write_run(tmp_path / "a", rewards=(0.0, 0.5, 1.0))  # at KL 0, 2, 4
    write_run(tmp_path / "b", seed=1, rewards=(0.0, 0.25, 0.5))  # at KL 0, 1, 2
    groups = read_groups([tmp_path])
    assert at_kl(groups["held"][0], "eval/reward", 3.0) == pytest.approx(0.75)
    assert at_kl(groups["held"][1], "eval/reward", 3.0) is None
    row = results(groups, ["eval/kl_completion"], kls=[1.0, 3.0]).splitlines()[-1]
    # at 1 nat both have 0.25; only one reaches 3 nats
    assert row.endswith("| 0.250 ± 0.000 | 0.750 (1 of 2) |")


def test_groups_that_start_alike_share_the_row_before_training(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, name=name)
    lines = results(read_groups([tmp_path]), ["eval/reward"]).splitlines()
    assert lines[2:] == ["| before training | | 0.000 |", "| a | 0 | 0.500 |", "| b | 0 | 0.500 |"]


def test_evaluations_of_several_policies_are_seeds_of_one(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed, model={"path": f"runs/s{seed}"})
    with pytest.raises(ConfigError, match="differ in model"):
        read_groups([tmp_path])
    for file in tmp_path.glob("*/summary.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 0}))
    assert len(read_groups([tmp_path])["held"]) == 2


def test_an_evaluation_alone_has_no_row_before_training(tmp_path):
    write_run(tmp_path / "a", name="a")
    write_run(tmp_path / "b", name="b", rewards=(0.7,))
    file = tmp_path / "b" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 0}))
    lines = results(read_groups([tmp_path]), ["eval/reward"]).splitlines()
    assert lines[2:] == ["| before training | | 0.000 |", "| a | 0 | 0.500 |", "| b | 0 | 0.700 |"]


def test_runs_without_a_reward_stand_in_the_table_and_not_in_its_curves(tmp_path):
    write_run(tmp_path / "runs" / "a")
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"b{seed}", name="supervised", seed=seed)
        for file in (tmp_path / "runs" / f"b{seed}").glob("*.json*"):
            file.write_text(file.read_text().replace("eval/reward", "eval/loss"))
    assert command(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--at-kl", "1"]) == 0
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| supervised |")).endswith("| – |")


def test_training_curves_are_drawn_and_an_unknown_metric_is_refused(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a")
    arguments = ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--train"]
    assert command([*arguments, "reward"]) == 0
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert command([*arguments, "rewardd"]) == 2 and "did you mean 'reward'" in capsys.readouterr().err
