"""rlft train: one run, or with -m a sweep of runs, each a process of its own (settings: conf/train.yaml, --help)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from rlft.cli.hydra_main import compose_and_call

PLACES = (
    "--config-dir",
    "-cd",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
)  # Hydra's flags for YAML files


def run(arguments: list[str]) -> int:
    def job(config: DictConfig) -> None:
        overrides = list(HydraConfig.get().overrides.task)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            code = sweep_job([*places(arguments), *overrides], given=arguments)
        else:
            code = one_run(config, overrides)
        if code:
            raise SystemExit(code)

    return compose_and_call(job, config_name="train", arguments=arguments)


def one_run(config: DictConfig, overrides: list[str]) -> int:
    from rlft.config import checked

    settings = checked(config)  # before anything heavy is imported
    from rlft.run import run

    # An experiment file may set anything; other overrides set the root setting or the group that they begin with.
    names = {re.split(r"[.=/@]", override.lstrip("+~"), maxsplit=1)[0] for override in overrides}
    return run(settings, None if "experiment" in names else names)


def sweep_job(arguments: list[str], *, given: list[str]) -> int:
    """Run one job of a sweep in a fresh process, so that no memory or random state leaks, and return its exit code.

    SIGTERM and SIGINT are passed on, so that the job saves a checkpoint. `given` are this process's own arguments.
    """
    job = subprocess.Popen([*_this_command(given), *arguments], start_new_session=True)
    before = {
        number: signal.signal(number, lambda received, frame: job.send_signal(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        code = job.wait()
        return code if code >= 0 else 128 - code  # killed by a signal: the exit code of a shell
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _this_command(given: list[str]) -> list[str]:
    """Return this process's command without its settings: python train.py, rlft train, or python -m rlft train."""
    start = len(sys.orig_argv) - len(given)
    if sys.orig_argv[start:] == given:
        return [sys.executable, *sys.orig_argv[1:start]]
    return [sys.executable, "-m", "rlft", "train"]  # called from within another program


def places(arguments: list[str]) -> list[str]:
    """Return the arguments that say where YAML files are: the flags in `PLACES`, and hydra.searchpath."""
    kept = []
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = flag.partition("=")
        if name in PLACES:
            kept += [name, value or following]
    return kept + [a for a in arguments if a.startswith("hydra.searchpath=")]  # flags come before overrides
