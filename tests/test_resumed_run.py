"""What is resumed, and what is not: runs that are done, directories that hold one, code that they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.builders import rows_of
from tests.test_run import STEPS, everything, last_line, run_here, whole, work  # noqa: F401  (two are fixtures)

# ruff: noqa: F811  (a fixture's name is its parameter's)


@pytest.mark.parametrize("sign", ["checkpoints", "summary.json", "samples.jsonl", "model", "metrics.jsonl"])
def test_each_sign_of_a_run_is_enough_to_refuse_its_directory(work, whole, tmp_path, capsys, sign):
    copied = tmp_path / sign
    shutil.copytree(whole / sign, copied) if (whole / sign).is_dir() else shutil.copy(whole / sign, copied)
    before = everything(tmp_path)
    assert work.here(f"run_dir={tmp_path}", "seed=1") == 7
    assert f"run_dir={tmp_path} holds a run" in last_line(capsys.readouterr().err)
    assert everything(tmp_path) == before


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def early(work, tmp_path_factory) -> Path:
    """The directory of a run that stopped early: it learns nothing, so that its first evaluation stays the best."""
    run_dir = tmp_path_factory.mktemp("early") / "run"
    settings = ["patience=2", "eval_every=1", "save_every=0", "learning_rate=1e-30", f"run_dir={run_dir}"]
    assert work.here(*settings) == 0
    return run_dir


@pytest.mark.parametrize(
    "changes, why", [((), "steps"), (("max_minutes=0.0001",), "steps"), (("keep=1", "tracker=none"), "steps")]
)
def test_resuming_a_finished_run_changes_no_byte_and_says_so(work, whole, capsys, changes, why):
    before = contents(whole)
    assert run_here(f"run_dir={whole}", "resume=true", work.trust, *changes) == 0
    assert capsys.readouterr().out == f"rlft: done before ({why}), and nothing is left to do: {whole}\n"
    assert contents(whole) == before


@pytest.mark.parametrize("changes", [(), ("steps=100",), ("max_tokens=100000",)])
def test_resuming_a_run_that_stopped_early_changes_no_byte_and_says_so(work, early, capsys, changes):
    assert json.loads((early / "summary.json").read_text())["exit_reason"] == "early_stopping"
    before = contents(early)
    assert run_here(f"run_dir={early}", "resume=true", work.trust, *changes) == 0
    assert "rlft: done before (early_stopping)" in capsys.readouterr().out
    assert contents(early) == before


def test_the_samples_of_the_best_policy_are_not_written_a_second_time_when_a_run_stops_early(early):
    steps = [row["step"] for row in rows_of(early / "samples.jsonl") if row.get("split") == "eval"]
    assert steps == [step for step in range(3) for _ in range(4)]  # eval_prompts=4, evaluated at 0, 1 and 2


def test_a_run_that_ended_by_tokens_goes_on_where_more_are_allowed(work, tmp_path, capsys):
    settings = [f"run_dir={tmp_path}", "max_tokens=40"]
    assert work.here(*settings) == 0
    ended = json.loads((tmp_path / "summary.json").read_text())
    assert ended["exit_reason"] == "max_tokens" and ended["steps"] < STEPS - 1
    assert work.here(*settings, "resume=true") == 0
    assert "done before (max_tokens)" in capsys.readouterr().out
    assert work.here(f"run_dir={tmp_path}", "resume=true", f"max_tokens={ended['num_tokens'] + 1}") == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == ended["steps"] + 1


@pytest.mark.parametrize("name", ["whole", "early"])
def test_a_run_that_was_killed_before_its_summary_writes_the_same_one(work, name, tmp_path, request):
    original = request.getfixturevalue(name)
    run_dir = shutil.copytree(original, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "model")
    assert run_here(f"run_dir={run_dir}", "resume=true", work.trust) == 0
    for file in ("summary.json", "metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (run_dir / file).read_bytes() == (original / file).read_bytes()


def test_resuming_runs_no_code_that_a_run_directory_names_but_does_with_its_module_trusted(
    work, whole, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mine.py").write_text("raise SystemExit(99)")
    monkeypatch.syspath_prepend(str(tmp_path))
    run_dir = shutil.copytree(whole, tmp_path / "run")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("rlft.tracking.trackers.NullTracker", "mine.Tracker"))
    assert run_here(f"run_dir={run_dir}", "resume=true", work.trust, "steps=10") == 2
    line = last_line(capsys.readouterr().err)
    assert "config.yaml: tracker._target_=mine.Tracker is code that is not rlft's" in line
    assert "trusted_modules=[mine]" in line
    assert run_here(f"run_dir={run_dir}", "resume=true", f"trusted_modules=[mine,{work.reward}]") == 99
    assert run_here(f"run_dir={run_dir}", "resume=true", work.trust, "tracker=none") == 0


def test_a_damaged_config_ends_a_resume_with_2_and_its_path(work, whole, tmp_path, capsys):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    (run_dir / "config.yaml").write_text("steps: [")
    assert run_here(f"run_dir={run_dir}", "resume=true") == 2
    assert last_line(capsys.readouterr().err).startswith(f"rlft: ConfigError: {run_dir / 'config.yaml'} is damaged")
