"""One run, or a sweep of runs: python train.py algo=grpo reward=sentiment (settings: conf/train.yaml, --help)."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    overrides = HydraConfig.get().overrides.task
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # A fresh process for each job of a sweep: no memory and no random state leaks from one to the next.
        job = subprocess.run([sys.executable, __file__, *overrides], check=False)
        if job.returncode:
            raise SystemExit(job.returncode)
        return
    from rlft.config import checked
    from rlft.run import run

    # An experiment file may set anything; other overrides set the root setting or the group that they begin with.
    names = {re.split(r"[.=/@]", override.lstrip("+~"), maxsplit=1)[0] for override in overrides}
    raise SystemExit(run(checked(config), None if "experiment" in names else names))


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
    raise SystemExit(command_line())
