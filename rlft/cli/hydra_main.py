"""Composes a command's configuration from conf/ and the command line by Hydra, with errors as `ConfigError`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlft.core.errors import RlftError
from rlft.core.paths import conf_directory


def compose_and_call(job: Callable[[DictConfig], None], *, config_name: str, arguments: list[str]) -> int:
    """Call `job` with conf/<config_name>.yaml and the overrides in `arguments`; once for each job of a sweep.

    Hydra's own flags work (--help, --cfg job, -m, --config-dir, …). Returns the exit code of a job that ends with
    SystemExit, else 0. Raises `ConfigError` if the configuration cannot be composed.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors, and does not print and exit
    is_composed, failed = False, list[RlftError]()

    @functools.wraps(job)
    def begun(config: DictConfig) -> None:
        nonlocal is_composed
        is_composed = True
        try:
            job(config)
        except RlftError as error:  # Hydra would print the whole command line as well
            failed.append(error)
            raise SystemExit(error.exit_code) from error
        is_composed = False  # a sweep now composes its next job

    main = hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name=config_name)(begun)
    before, sys.argv = sys.argv, [sys.argv[0], *arguments]  # Hydra reads them there
    try:
        main()
    except SystemExit as ended:
        if failed:
            raise failed[0] from failed[0].__cause__
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:
        if is_composed and not isinstance(error, (HydraException, OmegaConfBaseException)):
            raise
        from rlft.config import composition_error  # Hydra raises errors of many types for an odd override

        raise composition_error(error, overrides=arguments) from error
    finally:
        sys.argv = before
    return 0
