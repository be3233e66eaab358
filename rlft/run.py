"""One job from start to exit code: run directory, lock, signals, plan, training, the final policy and summary."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import FrameType

import yaml

from rlft import build
from rlft.config import RootConfig
from rlft.core.errors import ConfigError, RunDirectoryError
from rlft.saved_config import foreign_code, from_run, read_config
from rlft.tracking.progress import Progress
from rlft.trainer.checkpoint import Checkpoints
from rlft.trainer.train_state import TrainState
from rlft.trainer.trainer import Trainer

EXIT_DONE, EXIT_STOPPED = 0, 75
_LIMITS = {"steps", "max_minutes", "max_tokens"}
_MAY_CHANGE = {*_LIMITS, "resume", "dry_run", "run_dir", "trusted_modules", "log_every", "keep", "tracker"}
_SIGNS = ("metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "model")  # of a directory that holds a run
_PACKAGES = ("torch", "transformers", "accelerate", "numpy", "hydra-core", "tokenizers")


def run(config: RootConfig, given: Collection[str] | None = None) -> int:
    """Run one job and return its exit code. Raises an `RlftError`, which has an exit code of its own, where it fails.

    `given` names the root settings and groups that the command line sets; a resumed run takes the others from its
    config.yaml. None: all are given.
    """
    run_dir = _run_dir(config)
    if config.resume:
        config = _resumed(config, run_dir, given)
    if config.dry_run:
        job = build.build(config)
        with Progress(total_steps=config.steps, log_every=config.log_every) as progress:
            progress.plan(_plan(config, job, run_dir))
            build.trainer(job, run_dir=run_dir, progress=progress)  # a dry run refuses what the trainer would refuse
        return EXIT_DONE
    with _locked(run_dir), _signals() as stop:
        commit = source_commit()
        if config.resume:
            if reason := _done(run_dir, config):
                print(f"rlft: done before ({reason}), and nothing is left to do: {run_dir}")
                return EXIT_DONE
        else:
            _check_empty(run_dir)
        job = build.build(config)
        summary: dict = {}
        try:
            with Progress(total_steps=config.steps, log_every=config.log_every) as progress:
                progress.plan(_plan(config, job, run_dir))
                trainer = build.trainer(job, run_dir=run_dir, progress=progress)
                if config.resume:
                    trainer.resume()
                _write_config(run_dir, config)  # after the build, so that a failed build leaves the directory free
                resume_step = trainer.state.step if config.resume else None
                job.tracker.start(run_dir=run_dir, config=asdict(config), name=run_dir.name, resume_step=resume_step)
                reason = trainer.train(should_stop=lambda: bool(stop))
                if reason != "signal":
                    summary = _finish(run_dir, config, job, trainer, reason, commit)
                    if job.algorithm.is_evaluated:
                        progress.comparison(
                            "Held-out evaluation", before=trainer.state.before, after=trainer.state.after
                        )
        finally:
            job.tracker.close(summary=summary)  # also where training failed: what was logged is not lost
    if reason == "signal":
        where = f"rlft: stopped by a signal at step {trainer.state.step}"
        modules = ",".join(dict.fromkeys(module for _, _, module in foreign_code(_plain(config))))
        trust = f" 'trusted_modules=[{modules}]'" if modules else ""
        print(f"{where}; go on with: rlft train run_dir={run_dir} resume=true{trust}", file=sys.stderr)
        return EXIT_STOPPED
    print(f"rlft: done ({reason}): {run_dir}")
    return EXIT_DONE


def _plan(config: RootConfig, job: build.Job, run_dir: Path) -> list[tuple[str, str]]:
    limits = [f"{config.steps:,} optimizer steps"]
    limits += [f"{config.max_tokens:,} tokens"] if config.max_tokens is not None else []
    limits += [f"{config.max_minutes:g} minutes"] if config.max_minutes is not None else []
    return [
        ("run directory", str(run_dir)),
        ("device", f"{job.accelerator.device}, {job.accelerator.num_processes} process(es)"),
        ("policy", f"{type(job.run.policy).__name__}, {job.run.policy.num_parameters():,} parameters"),
        *job.algorithm.plan(),
        ("ends after", " or ".join(limits)),
    ]


def _run_dir(config: RootConfig) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir).resolve()
    if config.resume:
        raise ConfigError("resume=true needs run_dir=PATH, the run to go on with")
    base = Path("outputs") / config.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-s{config.seed}"
    path, number = base, 2
    try:
        while path.exists():
            path, number = base.with_name(f"{base.name}-{number}"), number + 1
    except OSError as error:
        raise RunDirectoryError(f"run_dir={path} cannot be written: {error.strerror}") from error
    return path.resolve()


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock goes with the process, however that ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a")
    except OSError as error:
        raise RunDirectoryError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryError(f"run_dir={run_dir} is in use by another process") from error
        try:
            yield
        finally:
            if [path.name for path in run_dir.iterdir()] == [".lock"]:  # it never held a run
                (run_dir / ".lock").unlink()
                run_dir.rmdir()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, so that the run stops with a checkpoint; a second one ends it at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_empty(run_dir: Path) -> None:
    """Refuse a directory that holds a run. A run that never logged a row may be replaced."""
    for path in (run_dir / name for name in _SIGNS):
        if any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size:
            raise RunDirectoryError(f"run_dir={run_dir} holds a run; give another one, or go on with it by resume=true")


def _done(run_dir: Path, config: RootConfig) -> str | None:
    """Return why the run in the directory ended, if everything is written; None where something is left to do.

    Raises `ConfigError` for fewer steps than it has done.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.keep)
    state = TrainState(**checkpoints.state(checkpoints.steps()[-1])["trainer"]) if checkpoints.steps() else TrainState()
    if config.steps < state.step:
        raise ConfigError(
            f"steps={config.steps}, but the run in {run_dir} has done {state.step}: give at least as many, or evaluate "
            f"its policy by steps=0 model.path=… in a directory of its own"
        )
    reason = state.ended(config)
    try:
        is_written = json.loads((run_dir / "summary.json").read_text())["steps"] == state.step
    except (OSError, ValueError, KeyError, TypeError):  # there is no summary: it is written last
        is_written = False
    return reason if is_written else None


def _resumed(config: RootConfig, run_dir: Path, given: Collection[str] | None) -> RootConfig:
    """Return the run's own configuration, with what the command line may change in it."""
    values, before = _plain(config), read_config(run_dir)
    given = set(values) if given is None else set(given)
    changed = [key for key in values if key in given and values[key] != before.get(key) and key not in _MAY_CHANGE]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"resume=true with another {key} than the run in {run_dir} ({values[key]!r}, was {before.get(key)!r}); "
            f"a resumed run may change only {', '.join(sorted(_MAY_CHANGE))}"
        )
    from_command_line = {key: value for key, value in values.items() if key in given or key not in before}
    return from_run(before, run_dir=run_dir, trusted=config.trusted_modules, given=from_command_line)


def _write_config(run_dir: Path, config: RootConfig) -> None:
    _write(run_dir / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False))


def _plain(config: RootConfig) -> dict:
    return json.loads(json.dumps(asdict(config)))  # tuples to lists


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _finish(
    run_dir: Path, config: RootConfig, job: build.Job, trainer: Trainer, reason: str, commit: str | None
) -> dict:
    """Export the final policy, write summary.json and return what it holds."""
    job.run.policy.save_hf(run_dir / "model", eos_id=job.run.tokenizer.eos_id)
    job.run.tokenizer.save(run_dir / "model")
    state = trainer.state
    summary = {
        "name": config.name,
        "exit_reason": reason,
        "steps": state.step,
        "metrics": trainer.last_row,
        "num_tokens": state.num_tokens,
        "seconds": round(state.seconds, 1),
        "evaluation": {"before": state.before, "after": state.after},
        "best": {"step": state.best_step, trainer.algorithm.objective[0]: state.best_value},
        "seed": config.seed,
        **provenance(job.accelerator.device, commit=commit),
    }
    _write(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def provenance(device: object, *, commit: str | None = None) -> dict:
    """Return what numbers were made with: commit (by default the source's now), versions and hardware."""
    return {
        "commit": commit or source_commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("rlft", *_PACKAGES)},
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, {device}",
    }


def source_commit() -> str | None:
    """Return the source's git commit, with -dirty where files differ from it; None outside a checkout of rlft."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__).parent
    for command in (
        ["git", "ls-files", "--error-unmatch", Path(__file__).name],  # an installed package may lie in another checkout
        ["git", "describe", "--always", "--exclude=*", "--dirty", "--abbrev=12"],
    ):
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        if result.returncode:
            return None
    return result.stdout.strip() or None
