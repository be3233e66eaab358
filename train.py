"""One run, or a sweep of runs: python train.py algo=grpo reward=sentiment (settings: conf/train.yaml, --help)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlft.memory import restart_with_huge_pages


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    overrides = HydraConfig.get().overrides.task
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        code = sweep_job([*hydra_arguments(sys.argv[1:]), *overrides])
        if code:
            raise SystemExit(code)
        return
    from rlft.config import checked
    from rlft.run import run

    # An experiment file may set anything; other overrides set the root setting or the group that they begin with.
    names = {re.split(r"[.=/@]", override.lstrip("+~"), maxsplit=1)[0] for override in overrides}
    raise SystemExit(run(checked(config), None if "experiment" in names else names))


def sweep_job(arguments: list[str]) -> int:
    """Run one job of a sweep in a fresh process: no memory and no random state leaks from one to the next.

    SIGTERM and SIGINT are handed on, so that the job saves its checkpoint; its exit code is returned.
    """
    job = subprocess.Popen([sys.executable, __file__, *arguments], start_new_session=True)
    before = {
        number: signal.signal(number, lambda received, frame: job.send_signal(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        code = job.wait()
        return code if code >= 0 else 128 - code  # a job that a signal killed, as a shell says it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hydra_arguments(arguments: list[str]) -> list[str]:
    """Return what says where a sweep's YAML files are: --config-dir, --config-path, --config-name, hydra.searchpath."""
    kept = []
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = flag.partition("=")
        if name in ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"):
            kept += [name, value or following]
    return kept + [a for a in arguments if a.startswith("hydra.searchpath=")]  # flags come before overrides


def command_line() -> int:
    """Run `main`; what a person can mend ends in one line on stderr and its exit code (the table is in README.md)."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors, in place of printing and exit code 1
    from rlft.config import composition_error
    from rlft.errors import RlftError

    try:
        main()
    except RlftError as error:
        failure = error
    except (HydraException, OmegaConfBaseException) as error:
        failure = composition_error(error)
    else:
        return 0
    print(f"rlft: {type(failure).__name__}: {failure}", file=sys.stderr)
    return failure.exit_code


if __name__ == "__main__":
    restart_with_huge_pages()
    raise SystemExit(command_line())
