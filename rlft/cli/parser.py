"""The parser of the commands that do not use Hydra: --help with examples, and mistakes as `ConfigError`."""

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

    def add_trusted_modules(self) -> None:
        about = "a module of yours that a run's config.yaml may name; without it only rlft's own parts are made"
        self.add_argument("--trusted-modules", action="append", default=[], metavar="MODULE", help=about)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse the arguments; flags may stand before, between and after the others."""
        return self.parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` (exit code 2) instead of printing the usage and exiting."""
        raise ConfigError(f"{message}; {self.prog} --help says what is allowed")


def output_directory(path: Path) -> Path:
    """Make a command's output directory before it computes anything; raises `ConfigError` if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be made a directory ({error.strerror}): name another one") from error
    return path
