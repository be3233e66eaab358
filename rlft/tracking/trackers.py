"""Trackers of metrics and samples: TensorBoard, wandb or none (the trainer itself writes the JSONL files)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import netrc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rlft.core.errors import ConfigError, nearest
from rlft.core.printable import printable

_MODES = ("online", "offline", "disabled")


class Tracker(Protocol):
    """A tracker, as the trainer calls it. Steps never decrease between `start` and `close`.

    `resume_step` of `start` is the number of optimizer steps that the run has done: None for a new run, 0 for a resumed
    run that had no checkpoint. Later steps that were logged before are logged again, and must not appear twice.
    """

    def start(self, *, run_dir: Path, config: dict, name: str, resume_step: int | None = None) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def samples(self, step: int, rows: list[dict]) -> None: ...

    def close(self, *, summary: dict) -> None: ...


class NullTracker:
    """Tracks nothing."""

    def start(self, *, run_dir: Path, config: dict, name: str, resume_step: int | None = None) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def samples(self, step: int, rows: list[dict]) -> None:
        pass

    def close(self, *, summary: dict) -> None:
        pass


class TensorBoardTracker:
    """Scalars, samples, configuration and summary in `run_dir/tensorboard`.

    Raises `ConfigError` if tensorboard is not installed.
    """

    def __init__(self) -> None:
        _require("tensorboard")
        self._writer: Any = None

    def start(self, *, run_dir: Path, config: dict, name: str, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = resume_step + 1 if resume_step else 0  # the first step that is logged, perhaps again
        # A new run has a purge_step too: one of TensorBoard's readers takes the first for the start, and purges only at
        # later ones.
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=first)
        self._write_text("config", _json_block(config), first)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in _values(metrics):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run keeps its curves

    def samples(self, step: int, rows: list[dict]) -> None:
        if rows:
            self._write_text("samples", _markdown_table(rows), step)

    def close(self, *, summary: dict) -> None:
        if self._writer is None:
            return
        if summary:
            self._write_text("summary", _json_block(summary), int(summary.get("steps", 0)))
        self._writer.close()
        self._writer = None

    def _write_text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)
        self._writer.flush()


class WandbTracker:
    """A Weights & Biases run with metrics, a table of samples for each evaluation, configuration and summary.

    Its files are in `run_dir/wandb`. The run's id is a hash of the run directory's path, so a resumed run continues its
    curves. Rows that wandb already has are not sent again, because a resumed run gives the same values.

    Arguments:
        project: wandb project.
        entity: user or team; None: your default one.
        mode: "online", "offline" (`wandb sync` uploads it later) or "disabled". None: WANDB_MODE if it is set, else
            online with a key (WANDB_API_KEY or a netrc login), else offline.
        tags: labels of the run.

    Raises `ConfigError` for a wrong argument, and if wandb is not installed.
    """

    def __init__(
        self, *, project: str = "rlft", entity: str | None = None, mode: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        if mode is not None and mode not in _MODES:
            raise ConfigError(f"tracker.mode={mode} is not one of {', '.join(_MODES)} or null{nearest(mode, _MODES)}")
        if isinstance(tags, str):
            raise ConfigError(f"tracker.tags={tags!r} is one string; give a list: tracker.tags=[{tags}]")
        _require("wandb")
        self.project, self.entity, self.mode, self.tags = project, entity, mode, list(tags)
        self._run: Any = None

    def start(self, *, run_dir: Path, config: dict, name: str, resume_step: int | None = None) -> None:
        import wandb

        mode: Any = self.mode or _default_mode()
        resume: Any = None  # offline, wandb accepts no `resume`
        if mode != "offline":
            resume = "never" if resume_step is None else "allow"
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=mode,
                tags=self.tags,
                config=config,
                name=name,
                id=_run_id(run_dir),
                resume=resume,
                dir=str(run_dir),
                allow_val_change=True,
                reinit="create_new",
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb could not start: {error}; tracker.mode=offline needs no server, tracker=none no wandb, and "
                f"where wandb holds another run of the same path, another run_dir helps"
            ) from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._log(step, dict(_values(metrics)))

    def samples(self, step: int, rows: list[dict]) -> None:
        import wandb

        columns = _columns(rows)
        data = [[step, *(row.get(name) for name in columns)] for row in rows]
        self._log(step, {"samples": wandb.Table(columns=["step", *columns], data=data, allow_mixed_types=True)})

    def close(self, *, summary: dict) -> None:
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()
            self._run = None

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:
            self._run.log(values, step=step)


def _require(package: str) -> None:
    """Raise `ConfigError` if a tracker's package is not installed; called before any weight is loaded."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"tracker={package} needs {package}: pip install 'rlft[{package}]' (or tracker=none)")


def _values(metrics: dict[str, float]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in metrics.items() if name != "step")  # "step" is the axis


def _run_id(run_dir: Path) -> str:
    return hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]


def _default_mode() -> str | None:
    """Return None (wandb reads WANDB_MODE itself) if WANDB_MODE is set, else online with a key, offline without."""
    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_login() else "offline"


def _has_netrc_login() -> bool:
    """Return whether there is a login in the files that wandb reads: $NETRC, ~/.netrc or ~/_netrc."""
    named = os.environ.get("NETRC")
    paths = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return False
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), so a wandb login cannot be looked up: set tracker.mode=online or offline"
        ) from error


def _json_block(values: dict) -> str:
    """Return `values` as JSON in a Markdown code block; it is indented, so that nothing inside can end it."""
    return "".join(f"    {line}\n" for line in json.dumps(values, indent=2, default=str).splitlines())


def _columns(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name != "step"))


def _markdown_table(rows: list[dict]) -> str:
    columns = _columns(rows)
    head = [_markdown_cell(name) for name in columns]
    cells = [[_markdown_cell(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(columns), *cells])


def _markdown_cell(value: Any) -> str:
    """Write ASCII punctuation as HTML entities, so that text is not read as Markdown, HTML or the border of a cell."""
    text = f"{value:.4g}" if isinstance(value, float) else printable(value)
    return "".join(f"&#{ord(c)};" if c.isascii() and not c.isalnum() and c != " " else c for c in text)
