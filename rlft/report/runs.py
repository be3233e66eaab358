"""Finished runs, read from their directories and grouped by name; the runs of a group differ only in their seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from rlft.core.errors import ConfigError

# Settings that may differ between the runs of a group.
_OF_A_RUN = {"seed", "run_dir", "resume", "dry_run", "tracker", "hardware", "log_every", "keep", "save_every"}


@dataclass(frozen=True)
class FinishedRun:
    """One finished run directory."""

    directory: Path
    summary: dict

    @property
    def name(self) -> str:
        return self.summary["name"]

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @cached_property
    def config(self) -> dict:
        return yaml.safe_load((self.directory / "config.yaml").read_text())

    @cached_property
    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl, by step."""
        return _rows(self.directory / "metrics.jsonl")

    @cached_property
    def evaluations(self) -> list[dict]:
        """The rows that hold an evaluation."""
        return [row for row in self.rows if any(key.startswith("eval/") for key in row)]

    def samples(self, step: int) -> list[dict]:
        """Return the held-out samples of the evaluation at `step`, in the order of their prompts."""
        rows = _rows(self.directory / "samples.jsonl")
        return [row for row in rows if row["step"] == step and row.get("split") == "eval"]


def read_groups(paths: list[Path]) -> dict[str, list[FinishedRun]]:
    """Return the finished runs at or below `paths`, by name and then by seed.

    Raises `ConfigError` if a path holds none, or if two runs of a name have the same seed.
    """
    groups: dict[str, dict[int, FinishedRun]] = {}
    for path in paths:
        found = sorted(path.rglob("summary.json"))
        if not found:
            raise ConfigError(f"{path} holds no finished run (no summary.json at or below it)")
        for file in found:
            run = FinishedRun(file.parent, json.loads(file.read_text()))
            _check_settings(run, groups.get(run.name, {}))
            other = groups.setdefault(run.name, {}).setdefault(run.seed, run)
            if other.directory.resolve() != run.directory.resolve():
                raise ConfigError(
                    f"{other.directory} and {run.directory} are both seed {run.seed} of '{run.name}'; name one of them"
                )
    return {name: [runs[seed] for seed in sorted(runs)] for name, runs in groups.items()}


def _check_settings(run: FinishedRun, others: dict[int, FinishedRun]) -> None:
    """Raise `ConfigError` for a run whose settings differ from those of the other runs of its group.

    The model of a run of no steps may differ, because such a run evaluates the policy of another run.
    """
    of_a_run = _OF_A_RUN | ({"model"} if run.summary.get("steps") == 0 else set())
    for other in others.values():
        ours, theirs = ({key: _seedless(value) for key, value in r.config.items()} for r in (run, other))
        keys = [key for key in ours if key not in of_a_run and ours[key] != theirs.get(key)]
        if keys:
            raise ConfigError(
                f"{other.directory} and {run.directory} are both named '{run.name}' and differ in {', '.join(keys)}; "
                f"give each setting its own name=…"
            )


def _seedless(value: object) -> object:
    return {key: part for key, part in value.items() if key != "seed"} if isinstance(value, dict) else value


def _rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
