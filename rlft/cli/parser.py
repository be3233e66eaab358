"""The parser of the commands that Hydra does not read: --help with examples, and mistakes as errors of ours."""

from __future__ import annotations

import argparse
from typing import NoReturn

from rlft.errors import ConfigError


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

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` (exit code 2) in place of printing the usage and leaving the process."""
        raise ConfigError(f"{message}; {self.prog} --help says what is allowed")
