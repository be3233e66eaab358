from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from rlft.core.errors import ConfigError
from rlft.tracking import trackers
from rlft.tracking.trackers import NullTracker, TensorBoardTracker, Tracker, WandbTracker

CONF = Path(__file__).parents[2] / "conf"
CONFIG = {"seed": 3, "algo": {"_target_": "x.Y", "note": "</script> `|`"}}
NASTY = "a | b\n<script>*c*</script> `d` \\| [e](f) \x1b[31m"
ROWS = [{"prompt": NASTY, "completion": "fine", "reward": 0.123456}, {"prompt": "p", "completion": NASTY}]


class FakeRun:
    """A wandb run that records its calls; `step` is the step that wandb has after a resume."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.rows, self.summary, self.is_finished = step, [], {}, False

    def log(self, values: dict, *, step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


@pytest.fixture
def inits(monkeypatch, logged_out):
    """The arguments of each `wandb.init`, which is replaced and starts nothing."""
    wandb = pytest.importorskip("wandb")
    calls = []

    def init(**arguments):
        calls.append(arguments)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    return calls


def started(tracker: Tracker, run_dir: Path, **options) -> Tracker:
    tracker.start(run_dir=run_dir, config=CONFIG, name="a run", **options)
    return tracker


def events(run_dir: Path, tag: str) -> list[tuple[int, Any]]:
    """The points of a curve or text as TensorBoard's server reads them, without those that a later file purges."""
    module = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    from tensorboard.util import tensor_util

    read = module.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={module.TENSORS: 0}).Reload()
    return [(event.step, tensor_util.make_ndarray(event.tensor_proto).ravel()[0]) for event in read.Tensors(tag)]


def text(run_dir: Path, name: str) -> list[tuple[int, str]]:
    return [(step, value.decode()) for step, value in events(run_dir, f"{name}/text_summary")]


@pytest.mark.parametrize("name", ["none", "tensorboard", "wandb"])
def test_every_tracker_config_composes_and_builds(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(overrides=[f"+tracker={name}"]).tracker
    if name != "none":
        pytest.importorskip(name)
    tracker = instantiate(node, _convert_="all")
    cls = {"none": NullTracker, "tensorboard": TensorBoardTracker, "wandb": WandbTracker}[name]
    assert type(tracker) is cls
    assert set(node) - {"_target_"} == set(inspect.signature(cls).parameters)  # the YAML has every setting


@pytest.mark.parametrize("cls", [NullTracker, TensorBoardTracker, WandbTracker])
def test_every_tracker_has_the_contracts_signatures(cls):
    for name in ("start", "log", "samples", "close"):
        assert inspect.signature(getattr(cls, name)) == inspect.signature(getattr(Tracker, name))


def test_the_null_tracker_writes_nothing(tmp_path):
    tracker = started(NullTracker(), tmp_path, resume_step=3)
    tracker.log(1, {"reward": 1.0})
    tracker.samples(1, ROWS)
    tracker.close(summary={"steps": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cls, package", [(TensorBoardTracker, "tensorboard"), (WandbTracker, "wandb")])
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, cls, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'rlft[{package}]'")):
        cls()


def test_tensorboard_holds_scalars_samples_config_and_summary(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = started(TensorBoardTracker(), tmp_path)
    tracker.log(0, {"step": 0, "eval/reward": 0.25})
    tracker.log(1, {"step": 1, "reward": math.nan})
    assert events(tmp_path, "eval/reward") == [(0, 0.25)]  # already before the run ends
    tracker.samples(1, ROWS)
    tracker.samples(2, [])
    tracker.close(summary={"steps": 7, "exit_reason": "steps"})
    [(step, value)] = events(tmp_path, "reward")
    assert step == 1 and math.isnan(value)
    with pytest.raises(KeyError):
        events(tmp_path, "step")  # the step is the axis, not a curve
    assert [step for step, _ in text(tmp_path, "samples")] == [1]
    for name, at, values in (("config", 0, CONFIG), ("summary", 7, {"steps": 7, "exit_reason": "steps"})):
        [(step, block)] = text(tmp_path, name)
        assert step == at and json.loads(block) == values


def test_tensorboard_flushes_after_the_last_value_of_each_row(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    tracker = started(TensorBoardTracker(), tmp_path)
    calls = []
    for name in ("add_scalar", "add_text", "flush"):
        monkeypatch.setattr(tracker._writer, name, lambda *_, name=name: calls.append(name))
    tracker.log(1, {"reward": 1.0, "kl": 0.0})
    tracker.samples(1, ROWS)
    assert calls == ["add_scalar", "add_scalar", "flush", "add_text", "flush"]
    monkeypatch.undo()
    tracker.close(summary={})


@pytest.mark.parametrize(
    "resume_step, steps", [(2, [0, 1, 2, 3, 4]), (0, [0, 3, 4]), (None, [0, 3, 4])], ids=["step 2", "none", "new run"]
)
def test_tensorboard_curves_do_not_double_after_a_resume(tmp_path, resume_step, steps):
    pytest.importorskip("tensorboard")
    tracker = started(TensorBoardTracker(), tmp_path)
    for step in range(5):
        tracker.log(step, {"reward": 1.0})
        tracker.samples(step, ROWS)
    tracker.close(summary={})
    tracker = started(TensorBoardTracker(), tmp_path, resume_step=resume_step)
    for step in (3, 4) if resume_step else (0, 3, 4):
        tracker.log(step, {"reward": 2.0})
        tracker.samples(step, ROWS)
    tracker.close(summary={})
    kept = [] if not resume_step else range(resume_step + 1)
    assert events(tmp_path, "reward") == [(step, 1.0 if step in kept else 2.0) for step in steps]
    assert [step for step, _ in text(tmp_path, "samples")] == steps


def test_tensorboard_shows_generated_text_as_it_is_in_a_table(tmp_path):
    pytest.importorskip("tensorboard")
    from html.parser import HTMLParser

    from tensorboard.plugin_util import markdown_to_safe_html

    class Cells(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.cells: list[str] = []

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            if tag in ("td", "th"):
                self.cells.append("")

        def handle_data(self, data):
            if self.cells and data.strip():
                self.cells[-1] += data

    tracker = started(TensorBoardTracker(), tmp_path)
    tracker.samples(5, ROWS)
    tracker.close(summary={})
    [(_, table)] = text(tmp_path, "samples")
    parser = Cells()
    parser.feed(markdown_to_safe_html(table))
    shown = NASTY.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert parser.cells == ["prompt", "completion", "reward", shown, "fine", "0.1235", "p", shown, ""]
    assert parser.tags == {"table", "thead", "tbody", "tr", "th", "td"}


def test_a_tracker_that_never_started_closes(tmp_path):
    pytest.importorskip("tensorboard")
    TensorBoardTracker().close(summary={"steps": 1})


def test_wandb_refuses_wrong_arguments():
    with pytest.raises(ConfigError, match=r"tracker.mode=ofline is not one of .*did you mean 'offline'"):
        WandbTracker(mode="ofline")
    with pytest.raises(ConfigError, match=r"tracker.tags=\[abc\]"):
        WandbTracker(tags="abc")


def test_wandb_is_offline_without_a_login_and_online_with_one(inits, tmp_path, monkeypatch, logged_out):
    def mode(**options):
        started(WandbTracker(**options), tmp_path)
        return inits[-1]["mode"]

    assert mode() == "offline"
    logged_out.write_text("machine other.example login user password x\n")
    assert mode() == "offline"
    logged_out.write_text("machine api.wandb.ai login user password x\n")
    assert mode() == "online"
    assert mode(mode="offline") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() is None  # wandb reads it
    assert mode(mode="online") == "online"


def test_wandb_with_a_damaged_netrc_says_so(inits, tmp_path, logged_out):
    logged_out.write_text("machine\n")
    with pytest.raises(ConfigError, match=r"set tracker\.mode="):
        started(WandbTracker(), tmp_path)
    assert inits == []


def test_wandb_goes_on_under_one_id_and_never_joins_another_run_unasked(inits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run_dir, resume_step in ((tmp_path / "a", None), (Path("a"), 40), (tmp_path / "a", 0), (tmp_path / "b", None)):
        started(WandbTracker(mode="online"), run_dir, resume_step=resume_step)
    first, *same, other = (call["id"] for call in inits)
    assert same == [first, first] and other != first
    assert [call["resume"] for call in inits] == ["never", "allow", "allow", "never"]
    assert [call["dir"] for call in inits] == [str(tmp_path / "a"), "a", str(tmp_path / "a"), str(tmp_path / "b")]


def test_wandb_is_not_sent_again_what_it_has(inits, tmp_path):
    tracker = started(WandbTracker(), tmp_path)
    tracker._run = run = FakeRun(step=42)
    for step in (41, 42, 43):
        tracker.log(step, {"step": step, "reward": 1.0})
        tracker.samples(step, ROWS)
    assert [step for step, _ in run.rows] == [42, 42, 43, 43]
    assert run.rows[0][1] == {"reward": 1.0}
    table = run.rows[1][1]["samples"]
    assert table.columns == ["step", "prompt", "completion", "reward"]
    assert table.data == [[42, NASTY, "fine", 0.123456], [42, "p", NASTY, None]]
    tracker.close(summary={"exit_reason": "steps"})
    tracker.close(summary={})
    assert run.is_finished and run.summary == {"exit_reason": "steps"}


def test_wandb_that_cannot_start_names_the_ways_on(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")

    def init(**arguments):
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match=r"no route; tracker.mode=offline .*tracker=none"):
        started(WandbTracker(mode="online"), tmp_path)


def test_a_real_offline_wandb_run_is_complete_on_disk(tmp_path):
    pytest.importorskip("wandb")
    script = f"""
from pathlib import Path
from rlft.tracking.trackers import WandbTracker
tracker = WandbTracker(project="a_project", tags=["a_tag"])
tracker.start(run_dir=Path({str(tmp_path)!r}), config={{"a_setting": "a_config_value"}}, name="a_name", resume_step=0)
tracker.log(0, {{"step": 0, "a_metric": 0.5}})
tracker.samples(0, [{{"prompt": "a_prompt", "completion": "a_completion", "reward": None}}])
tracker.log(1, {{"step": 1, "a_metric": float("nan")}})
tracker.close(summary={{"exit_reason": "a_reason", "evaluation": {{"before": {{"a_summary": 1.0}}}}}})
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"NETRC": str(tmp_path / "absent"), "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120, cwd=CONF.parent)
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith(trackers._run_id(tmp_path))
    [log] = run.glob("*.wandb")
    written = log.read_bytes()
    for word in ("a_project", "a_tag", "a_setting", "a_config_value", "a_name", "a_metric", "a_reason", "a_summary"):
        assert word.encode() in written, word
    [table] = run.glob("files/media/table/samples_*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["step", "prompt", "completion", "reward"], "data": [[0, "a_prompt", "a_completion", None]],
    }  # fmt: skip
