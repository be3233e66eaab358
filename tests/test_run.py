"""train.py from start to exit code: same bits, kills and signals, wrong input, what a run leaves behind."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rlft.models.gpt2 import GPT2
from tests.builders import is_measured, rows_of

TRAIN = Path(__file__).parents[1] / "train.py"
STEPS = 8
REWARD = """
import os, signal, time
calls = 0

def letters(completions, **kwargs):
    global calls
    calls += 1  # the first call is the evaluation before training, so call n is in optimizer step n - 1
    name, to, call = os.environ.get("SEND", "SIGTERM self never").split()
    if call == str(calls):
        os.kill({"self": os.getpid(), "parent": os.getppid()}[to], getattr(signal, name))
        time.sleep(1)  # in which it arrives
    print("reward in process", os.getpid())
    return [sum(c.isascii() and c.isalpha() for c in text) / 4 for text in completions]

def broken(completions, **kwargs):
    letters(completions)
    raise KeyError("label")  # line 17
"""


class Workplace:
    """A directory with a data set, a reward and the settings of a run of a tenth of a second."""

    def __init__(self, directory: Path) -> None:
        self.reward, self.data = directory / "reward.py", directory / "prompts.jsonl"
        self.reward.write_text(REWARD)
        self.data.write_text("".join(json.dumps({"prompt": f"film {i} of {i * i}"}) + "\n" for i in range(40)))
        self.trust = f"trusted_modules=[{self.reward}]"
        self.settings = [
            "model=gpt2_scratch", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.n_positions=32",
            "model.seed=0", "model.tokenizer.vocab_size=260", "data=prompts", f"data.source.path={self.data}",
            "data.source.validation=0.2", "algo=grpo", "reward=custom", f"reward.custom.function={self.reward}:letters",
            "tracker=none", "hardware=cpu", "hardware.num_threads=1", f"steps={STEPS}", "prompts_per_step=2",
            "group_size=4", "micro_batch=5", "max_new_tokens=4", "eval_prompts=4", "save_every=3", "learning_rate=1e-2",
        ]  # fmt: skip

    def here(self, *overrides: str) -> object:
        return run_here(*self.settings, *overrides)

    def apart(self, *overrides: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run train.py in a process of its own; options such as -m go before the settings."""
        settings = sorted([*self.settings, *overrides], key=lambda text: not text.startswith("-"))
        command, env = [sys.executable, str(TRAIN), *settings], os.environ | env
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=env)


def run_here(*overrides: str) -> object:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [str(TRAIN), *overrides])
        runpy.run_path(str(TRAIN), run_name="__main__")
    return ended.value.code


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLFT_CACHE", str(directory / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Workplace(directory)


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory) -> Path:
    """The directory of a run in a process of its own that nothing stopped; no test may change it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    result = work.apart(f"run_dir={run_dir}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"rlft: done (steps): {run_dir}"
    return run_dir


def metrics(run_dir: Path) -> list[dict]:
    rows = rows_of(run_dir / "metrics.jsonl", times=True)
    return [{k: v for k, v in row.items() if not is_measured(k)} for row in rows]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def results(run_dir: Path) -> dict:
    """All that a run computed, tensors as bytes."""
    last = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    files = [run_dir / "model" / "model.safetensors", last / "policy.safetensors", last / "optimizer.safetensors"]
    return {path.name: path.read_bytes() for path in files} | {
        "metrics": metrics(run_dir), "samples": rows_of(run_dir / "samples.jsonl")
    }  # fmt: skip


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in directory.rglob("*") if p.name != ".lock"}


def last_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


def test_two_runs_of_one_seed_compute_the_same_and_another_seed_does_not(work, whole, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    assert work.here(f"run_dir={same}") == 0
    assert results(same) == results(whole)
    assert work.here(f"run_dir={other}", "seed=1") == 0
    expected, found = metrics(whole), metrics(other)
    assert [row["step"] for row in expected] == [row["step"] for row in found] == list(range(STEPS + 1))
    assert found[0] == expected[0]  # the same weights (model.seed), evaluated with the same draws
    assert all(a["grad_norm"] != b["grad_norm"] for a, b in zip(found[1:], expected[1:], strict=True))


def test_a_killed_run_resumes_by_its_directory_alone_to_the_bits_of_one_that_was_not(work, whole, tmp_path):
    killed = work.apart(f"run_dir={tmp_path}", SEND="SIGKILL self 6")
    assert killed.returncode == -signal.SIGKILL
    assert checkpoints(tmp_path) == ["step_00000003"]
    assert metrics(tmp_path)[-1]["step"] == 4  # logged, and lost: it is computed again
    assert run_here(f"run_dir={tmp_path}", "resume=true", work.trust) == 0
    assert results(tmp_path) == results(whole)


def test_sigterm_ends_with_75_and_a_checkpoint_of_its_step_and_the_resumed_run_has_the_same_bits(work, whole, tmp_path):
    stopped = work.apart(f"run_dir={tmp_path}", SEND="SIGTERM self 6")
    assert stopped.returncode == 75, stopped.stderr
    message = f"rlft: stopped by a signal at step 5; go on with: rlft train run_dir={tmp_path} resume=true"
    assert last_line(stopped.stderr) == f"{message} '{work.trust}'"
    assert checkpoints(tmp_path) == ["step_00000003", "step_00000005"]
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "model").exists()
    resumed = work.apart(f"run_dir={tmp_path}", "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert results(tmp_path) == results(whole)


def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_is(work, whole, capsys):
    before = everything(whole)
    assert work.here(f"run_dir={whole}") == 7
    line = f"rlft: RunDirectoryError: run_dir={whole} holds a run; give another one, or go on with it by resume=true"
    assert last_line(capsys.readouterr().err) == line
    assert everything(whole) == before


def test_a_directory_that_another_process_works_in_is_refused(work, tmp_path):
    with (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = work.apart(f"run_dir={tmp_path}")
    assert refused.returncode == 7
    assert last_line(refused.stderr) == f"rlft: RunDirectoryError: run_dir={tmp_path} is in use by another process"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("override, key", [
    ("learning_rate=-1", "learning_rate=-1.0 must be above 0"),
    ("+algo.kl.coeff=1", "unknown setting 'algo.kl.coeff' (did you mean 'coef'?)"),
    ("tracker._target_=rlft.nope.X", "tracker._target_=rlft.nope.X"),
    ("resume=true", "resume=true needs run_dir=PATH"),
    ("stepss=3", "unknown setting 'stepss' (did you mean 'steps'?)"),  # these three are refused by Hydra
    ("algo=grppo", "algo=grppo does not exist (did you mean 'grpo'?)"),
    ("steps=[1", "steps=[1"),
    ("algo=0", "algo=0: a group is given the name of a file"),  # these Hydra meets with errors of Python's
    ("reward=[0]", "reward=[0]: a group is given the name of a file"),
    ("model=null", "model=null: a group is given the name of a file"),
    ("algo/kl=3", "algo/kl=3: a group is given the name of a file"),
    ("=3", "=3: a group is given the name of a file"),
    ("hydra.run.dir=/proc/x", "/proc/x"),
    ("max_new_tokens=64", "max_new_tokens=64 do not fit the model's context of 32"),
])  # fmt: skip
def test_a_wrong_setting_ends_with_2_and_its_key_on_the_last_line(work, tmp_path, monkeypatch, capsys, override, key):
    monkeypatch.chdir(tmp_path)
    assert work.here(override) == 2
    line = last_line(capsys.readouterr().err)
    assert line.startswith("rlft: ConfigError: ") and key in line
    assert list(tmp_path.rglob("config.yaml")) == []


@pytest.mark.parametrize("is_first", [True, False])
def test_a_name_that_no_directory_can_have_ends_with_7_and_the_reason(work, tmp_path, monkeypatch, capsys, is_first):
    monkeypatch.chdir(tmp_path)
    if not is_first:
        (tmp_path / "outputs").mkdir()
    assert work.here("name=" + "x" * 300) == 7
    assert last_line(capsys.readouterr().err).endswith("cannot be written: File name too long")


def test_a_bad_data_row_ends_with_3_and_its_line_and_leaves_the_directory_free(work, tmp_path, capsys):
    lines = work.data.read_text().splitlines(keepends=True)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join([*lines[:2], '{"prompt": 3}\n', *lines[2:]]))
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.source.path={data}", "steps=1"]
    assert work.here(*overrides) == 3
    assert last_line(capsys.readouterr().err).startswith(f"rlft: DataError: {data}:3: ")
    data.write_text("".join(lines))
    assert work.here(*overrides) == 0  # the same command, the row mended


def test_a_reward_that_raises_ends_with_4_and_its_name_and_place(work, tmp_path, capsys):
    assert work.here(f"run_dir={tmp_path}", f"reward.custom.function={work.reward}:broken") == 4
    line = f"rlft: RewardError: reward 'custom' raised KeyError: 'label' (in {work.reward}:17)"
    assert last_line(capsys.readouterr().err) == line


def test_three_non_finite_steps_in_a_row_end_with_5_and_name_the_saved_batch(work, tmp_path, capsys):
    assert work.here(f"run_dir={tmp_path}", "learning_rate=1e38") == 5  # step 1 blows the weights up
    line = last_line(capsys.readouterr().err)
    [batch] = map(str, tmp_path.glob("*.safetensors"))
    assert line.startswith("rlft: NonFiniteError: 3 steps in a row (the last is 4)") and batch in line
    assert [row["non_finite_steps"] for row in metrics(tmp_path)[1:]] == [0, 1, 2]


def test_a_damaged_checkpoint_ends_a_resume_with_6_and_its_file(work, whole, tmp_path, capsys):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    file = run_dir / "checkpoints" / f"step_{STEPS:08d}" / "policy.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert work.here(f"run_dir={run_dir}", "resume=true") == 6
    assert last_line(capsys.readouterr().err).startswith(f"rlft: CheckpointError: {file} is missing or damaged")


def test_a_resumed_run_may_be_longer_but_not_another_one(work, whole, tmp_path, capsys):
    before = everything(whole)
    assert work.here(f"run_dir={whole}", "resume=true", "learning_rate=2e-2") == 2
    assert "another learning_rate than the run" in last_line(capsys.readouterr().err)
    assert everything(whole) == before
    assert work.here(f"run_dir={tmp_path}", "resume=true") == 7  # there is nothing to go on with
    run_dir = shutil.copytree(whole, tmp_path / "run")
    assert work.here(f"run_dir={run_dir}", "resume=true", "steps=10") == 0
    rows = metrics(run_dir)
    assert rows[: STEPS + 1] == metrics(whole) and [row["step"] for row in rows[STEPS + 1 :]] == [9, 10]


def test_a_resumed_run_cannot_have_fewer_steps_than_it_has_done(work, whole, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    before = (run_dir / "config.yaml").read_text()
    assert work.here(f"run_dir={run_dir}", "resume=true", "steps=0") == 2
    assert f"steps=0, but the run in {run_dir} has done {STEPS}" in last_line(capsys.readouterr().err)
    assert (run_dir / "config.yaml").read_text() == before


def test_no_steps_is_an_evaluation(work, whole, tmp_path):
    run_dir = tmp_path / "run"
    assert work.here(f"run_dir={run_dir}", "steps=0", "warmup_steps=0") == 0
    assert metrics(run_dir) == metrics(whole)[:1]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 0 and summary["evaluation"]["after"] == summary["evaluation"]["before"]


def test_a_dry_run_prints_the_plan_and_makes_no_directory(work, tmp_path, capsys):
    assert work.here(f"run_dir={tmp_path / 'run'}", "dry_run=true", "max_tokens=5000") == 0
    out = " ".join(capsys.readouterr().out.split())
    for line in (
        str(tmp_path / "run"),
        "policy GPT2, 7,984 parameters",
        "2 prompts x 4 = 8",
        "8 optimizer steps or 5,000 tokens",
    ):
        assert line in out
    assert list(tmp_path.iterdir()) == []


def test_the_exported_model_gives_the_logits_of_the_last_checkpoint_in_transformers(whole):
    ours = GPT2.from_pretrained(str(whole / "checkpoints" / checkpoints(whole)[-1])).eval()
    theirs = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32).eval()
    ids = torch.randint(0, 260, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(ids) @ ours.head_weight.T
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-5, rtol=0.0)  # float32
    assert logits.std() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    text = "a film, très  bon\n\tand “great” 🎬"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == theirs.config.vocab_size == 260


def test_a_model_of_transformers_trains_and_resumes_to_the_same_bits(work, whole, tmp_path):
    path, settings = tmp_path / "llama", [one for one in work.settings if not one.startswith("model")]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(whole / "model").save_pretrained(path)
    settings += ["model=hf", f"model.path={path}"]
    assert run_here(*settings, f"run_dir={tmp_path / 'whole'}") == 0
    assert run_here(*settings, f"run_dir={tmp_path / 'parts'}", "steps=3") == 0
    assert run_here(f"run_dir={tmp_path / 'parts'}", "resume=true", f"steps={STEPS}", work.trust) == 0
    parts = results(tmp_path / "parts")  # whose rows have one more evaluation, where it stopped
    assert all(parts[name] == value for name, value in results(tmp_path / "whole").items() if isinstance(value, bytes))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_summary_holds_evaluations_tokens_time_source_and_why_it_ended(whole):
    summary = json.loads((whole / "summary.json").read_text())
    rows = rows_of(whole / "metrics.jsonl", times=True)
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    assert before.keys() == after.keys() == {key for key in rows[0] if key.startswith("eval/")}
    assert before.items() <= rows[0].items() and after.items() <= rows[-1].items() and before != after
    assert (summary["exit_reason"], summary["steps"], summary["seed"]) == ("steps", STEPS, 0)
    assert summary["metrics"] == rows[-1] and summary["num_tokens"] == rows[-1]["num_tokens"]
    assert summary["seconds"] == round(rows[-1]["wall_time"], 1)
    commit = r"[0-9a-f]{12,40}(-dirty)?" if (TRAIN.parent / ".git").exists() else "None"
    assert re.fullmatch(commit, str(summary["commit"]))
    packages = ("rlft", "torch", "transformers", "accelerate", "numpy", "hydra-core", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    assert summary["versions"].items() >= (versions | {"python": platform.python_version()}).items()


def test_each_job_of_a_sweep_is_a_process_of_its_own_and_a_failing_one_is_the_exit_code(work, tmp_path):
    functions = f"reward.custom.function={work.reward}:letters,{work.reward}:broken"
    sweep = work.apart("-m", functions, "steps=1", "seed=3", cwd=tmp_path)
    assert sweep.returncode == 4, sweep.stderr
    assert last_line(sweep.stderr).startswith("rlft: RewardError: ")
    assert len(set(re.findall(r"reward in process (\d+)", sweep.stdout))) == 2
    done, failed = sorted((tmp_path / "outputs" / "grpo").iterdir())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-s3(-2)?", done.name)
    assert (done / "summary.json").exists() and not (failed / "summary.json").exists()


def test_a_sweep_hands_yaml_of_ones_own_and_sigterm_on_to_its_jobs_and_ends_with_their_75(work, tmp_path):
    for place, file in (("a", "hardware/cpu"), ("b", "tracker/none")):
        (tmp_path / place / file).parent.mkdir(parents=True)
        shutil.copy(TRAIN.parent / "conf" / f"{file}.yaml", (tmp_path / place / file).with_name("mine.yaml"))
    own = [f"--config-dir={tmp_path / 'a'}", f"hydra.searchpath=[file://{tmp_path / 'b'}]"]
    sweep = work.apart("-m", *own, "hardware=mine", "tracker=mine", "seed=0,1", cwd=tmp_path, SEND="SIGTERM parent 3")
    assert sweep.returncode == 75, sweep.stderr
    [stopped] = (tmp_path / "outputs" / "grpo").iterdir()
    assert checkpoints(stopped) == ["step_00000002"]
