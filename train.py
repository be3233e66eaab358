"""One run, or a sweep of runs: python train.py algo=grpo reward=sentiment (settings: conf/train.yaml, --help)."""

from __future__ import annotations

import subprocess
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        # A fresh process for each job of a sweep: no memory and no random state leaks from one to the next.
        job = subprocess.run([sys.executable, __file__, *HydraConfig.get().overrides.task], check=False)
        if job.returncode:
            raise SystemExit(job.returncode)
        return
    from rlft.config import checked
    from rlft.errors import RlftError
    from rlft.run import run

    try:
        code = run(checked(config))
    except RlftError as error:
        print(f"rlft: {type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    raise SystemExit(code)


if __name__ == "__main__":
    main()
