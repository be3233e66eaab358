"""The errors that end a run, each with its exit code (README.md has the table)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class RlftError(Exception):
    """Base of all errors that a user can correct; `exit_code` is the exit status of the process."""

    exit_code = 1


class ConfigError(RlftError, ValueError):
    """A setting is wrong, missing or unknown."""

    exit_code = 2


class DataError(RlftError, ValueError):
    """A data set, or a row of it, cannot be used; the message names the file and the line."""

    exit_code = 3


class RewardError(RlftError, ValueError):
    """A reward failed, timed out, or returned a value that is not a reward."""

    exit_code = 4


class NonFiniteError(RlftError, ArithmeticError):
    """Too many optimizer steps in a row had a loss or gradient that is not finite."""

    exit_code = 5


class CheckpointError(RlftError, ValueError):
    """A checkpoint is incomplete, damaged, or of another model."""

    exit_code = 6


class RunDirectoryError(RlftError, OSError):
    """The run directory holds another run, or another process is writing to it."""

    exit_code = 7


def check_choice(key: str, value: object, allowed: Collection[str]) -> None:
    """Raise `ConfigError` for a value that is not allowed; the message names the key and the nearest allowed value."""
    if value not in allowed:
        raise ConfigError(f"{key} is one of {', '.join(allowed)}, got {value!r}{nearest(str(value), allowed)}")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the allowed name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
