"""The parser of the commands that Hydra does not read: --help with examples, and mistakes as errors of ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from rlft.core.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """The arguments of `rlft <name>`; `about` is the help text, `examples` are whole command lines."""

    def __init__(self, name: str, about: str | None, *, examples: tuple[str, ...]) -> None:
        super().__init__(
            prog=f"rlft {name}",
            description=about,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Return the arguments, flags before and behind the others."""
        return self.parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` (exit code 2) in place of printing the usage and leaving the process."""
        raise ConfigError(f"{message}; {self.prog} --help says what is allowed")


def output_directory(path: Path) -> Path:
    """Make a directory for what a command will write, before it computes; raises `ConfigError` if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be made a directory ({error.strerror}): name another place") from error
    return path
