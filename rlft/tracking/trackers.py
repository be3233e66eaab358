"""Where metrics go beside metrics.jsonl and samples.jsonl (which the trainer writes): TensorBoard, wandb or nowhere."""

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
    """What the trainer tells a tracker. Steps never go back between `start` and `close`.

    `start`'s `resume_step` is the number of optimizer steps that the run has behind it: None for a new run, 0 where a
    run goes on that had no checkpoint. What had been logged for later steps is logged again, and must not show twice.
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

    Raises `ConfigError` where tensorboard is not installed.
    """

    def __init__(self) -> None:
        _require("tensorboard")
        self._writer: Any = None

    def start(self, *, run_dir: Path, config: dict, name: str, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = resume_step + 1 if resume_step else 0  # the first step that is logged, perhaps again
        # A new run is marked too: one of TensorBoard's readers takes the first mark for a start, purges at later ones.
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=first)
        self._write_text("config", _json_block(config), first)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in _values(metrics):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run keeps its curves, where the file system buffers too

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

    Its files lie under `run_dir/wandb`. The run's id is a hash of the run directory's path, so that a resumed run goes
    on in the same curves; rows that wandb has already are not sent again (contract 10: they are the same).

    Arguments:
        project: wandb project.
        entity: user or team; None for your default one.
        mode: "online", "offline" (`wandb sync` uploads it later) or "disabled". None: WANDB_MODE where that is set,
            else online with a key (WANDB_API_KEY or a netrc login), else offline.
        tags: labels of the run.

    Raises `ConfigError` for a wrong argument, and where wandb is not installed.
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
        resume: Any = None  # offline, wandb takes none
        if mode != "offline":
            resume = "never" if resume_step is None else "allow"
        try:
            self._run = wandb.init(
                project=self.project, entity=self.entity, mode=mode, tags=self.tags, config=config, name=name,
                id=_run_id(run_dir), resume=resume, dir=str(run_dir),
                allow_val_change=True, reinit="create_new", settings=wandb.Settings(console="off"),
            )  # fmt: skip
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
        table = wandb.Table(
            columns=["step", *columns], data=[[step, *(row.get(name) for name in columns)] for row in rows],
            allow_mixed_types=True,
        )  # fmt: skip
        self._log(step, {"samples": table})

    def close(self, *, summary: dict) -> None:
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()
            self._run = None

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:
            self._run.log(values, step=step)


def _require(package: str) -> None:
    """Refuse a tracker whose package is missing, before any weight is loaded."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"tracker={package} needs {package}: pip install 'rlft[{package}]' (or tracker=none)")


def _values(metrics: dict[str, float]) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in metrics.items() if name != "step")  # the step is the axis


def _run_id(run_dir: Path) -> str:
    return hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]


def _default_mode() -> str | None:
    """Return wandb's own choice (None) where WANDB_MODE makes it, else online with a key and offline without."""
    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_login() else "offline"


def _has_netrc_login() -> bool:
    """Look for a login where wandb looks: $NETRC, ~/.netrc, ~/_netrc."""
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
    """Return `values` as JSON in a Markdown code block (indented: nothing inside can end it)."""
    return "".join(f"    {line}\n" for line in json.dumps(values, indent=2, default=str).splitlines())


def _columns(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name != "step"))


def _markdown_table(rows: list[dict]) -> str:
    columns = _columns(rows)
    head = [_markdown_cell(name) for name in columns]
    cells = [[_markdown_cell(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(columns), *cells])


def _markdown_cell(value: Any) -> str:
    """Write ASCII punctuation as HTML entities, so that text is neither Markdown nor HTML nor a table's edge."""
    text = f"{value:.4g}" if isinstance(value, float) else printable(value)
    return "".join(f"&#{ord(c)};" if c.isascii() and not c.isalnum() and c != " " else c for c in text)
