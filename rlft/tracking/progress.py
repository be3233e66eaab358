"""The display of a run: live on a terminal, plain lines elsewhere. The library rich draws it.

Control characters in generated text are escaped, and the text is never read as markup, so no completion can move the
cursor, colour the screen or break a table.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlft.core.errors import ConfigError
from rlft.core.printable import printable

WINDOW = 20  # the last calls of `step`, from which ETA and the shares of generation and update are computed
REFRESHES = 2  # of the live display, per second

# metric, label, format
_ONLINE = (
    ("kl", "kl", ".3f"),
    ("entropy", "entropy", ".2f"),
    ("completions/mean_length", "length", ".1f"),
    ("eval/reward", "eval reward", ".3f"),
)
_SUPERVISED = (
    ("loss", "loss", ".4f"),
    ("val/perplexity", "perplexity", ".2f"),
    ("eval/perplexity", "perplexity", ".2f"),
    ("learning_rate", "lr", ".1e"),
)


class _Field(NamedTuple):
    label: str  # above the value in the live display
    value: str
    phrase: str  # label and value, in a plain line


class Progress:
    """The display of one run; a context manager, which restores the terminal however the run ends.

    Arguments:
        total_steps: optimizer steps of the whole run, including those before a resume.
        interactive: a live display (True), plain lines (False), or as the console allows (None).
        log_every: steps between plain lines; the last step and every step with an evaluation have one too.
        console: where to draw; None: standard output.
        clock: a monotonic clock in seconds, for elapsed time and ETA.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        interactive: bool | None = None,
        log_every: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_steps < 0:
            raise ConfigError(f"total_steps must be at least 0, got {total_steps}; set steps=N")
        if log_every < 1:
            raise ConfigError(f"log_every must be at least 1, got {log_every}")
        if console is None:  # FORCE_COLOR must not make a log file a terminal
            console = Console(force_terminal=sys.stdout.isatty() if interactive is None else interactive)
        self.console, self.total_steps, self.log_every = console, total_steps, log_every
        self.interactive = console.is_interactive if interactive is None else interactive
        self._clock, self._began = clock, clock()
        self._live: Live | None = None
        self._is_open = False
        self._step = 0
        self._latest: dict[str, float] = {}
        self._fields: list[_Field] = []
        self._ends_at: float | None = None  # on `clock`
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # (clock, step)
        self._times: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)  # rollout, update and whole step, seconds

    def __enter__(self) -> Progress:
        self._is_open, self._began = True, self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        live, self._live = self._live, None
        if live is not None:
            try:
                live.stop()
            finally:
                self.console.show_cursor(True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` of `total_steps` optimizer steps are done, with that step's metrics.

        Only the metrics named above are shown, and a value that is not finite is shown as nan. (metrics.jsonl and the
        trackers have every value.)
        """
        self._step = step
        self._latest = {**self._latest, **metrics}
        self._note_times(metrics)
        self._ends_at = self._estimate_end(metrics)
        self._fields = self._make_fields()
        if self.interactive:
            self._start_live()
        elif step % self.log_every == 0 or step >= self.total_steps or _has_evaluation(metrics):
            self._print(self._line())
            self._latest = {}

    def message(self, text: str) -> None:
        """Print one or more lines, above the live display if there is one."""
        self._print("\n".join(printable(line) for line in str(text).split("\n")))

    def samples(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print generated text; `rows` have the keys `prompt`, `completion` and, optionally, `reward`."""
        has_reward = any("reward" in row for row in rows)
        cells = [self._sample_cells(row)[: 3 if has_reward else 2] for row in rows]
        if not self.interactive:
            self._print(printable(title))
            for prompt, completion, *reward in cells:
                self._print(f"{prompt} | {completion}" + "".join(f" ({value})" for value in reward))
            return
        table = Table(title=Text(self._encodable(printable(title))), title_justify="left", show_lines=True)
        for name in ("prompt", "completion"):
            table.add_column(name, overflow="fold")
        if has_reward:
            table.add_column("reward", justify="right", no_wrap=True)
        for row in cells:
            table.add_row(*(Text(self._encodable(cell)) for cell in row))
        self.console.print(table)

    def plan(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values before training, such as the sizes that follow from the settings."""
        clean = [(printable(str(name)), printable(str(value))) for name, value in rows]
        if self.interactive:
            table = Table.grid(padding=(0, 2))
            table.add_column(style="dim", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in clean:
                table.add_row(Text(self._encodable(name)), Text(self._encodable(value)))
            self.console.print(table)
            return
        width = max((len(name) for name, _ in clean), default=0)
        for name, value in clean:
            self._print(f"{name:<{width}}  {value}")

    def comparison(self, title: str, *, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Print two evaluations side by side, a line for each metric that both have."""
        names = [name for name in before if name in after]
        width = max((len(name) for name in names), default=0)
        lines = [f"{title:<{width}}  {'before':>8}  {'after':>8}"]
        lines += [f"{name:<{width}}  {_number(before[name], '8.3f')}  {_number(after[name], '8.3f')}" for name in names]
        self.message("\n".join(lines))

    def _start_live(self) -> None:
        """Start the live display at the first step, so that a run that only prints its plan leaves no empty bar."""
        if self._is_open and self._live is None:
            self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=REFRESHES)
            self._live.start()

    def _render(self) -> Group:
        """Draw the display. rich calls this in its own thread, so it only reads what `step` has prepared."""
        step, total, fields = self._step, self.total_steps, self._fields
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(f"step {step}/{total}", style="bold"),
            ProgressBar(total=max(total, 1), completed=step if total else 1, width=24),
            Text(f"{_duration(self._clock() - self._began)} elapsed"),
            Text(f"ETA {self._eta()}"),
        )
        values = Table(box=None, pad_edge=False, header_style="dim")
        for field in fields:
            values.add_column(field.label)
        values.add_row(*(Text(self._encodable(field.value)) for field in fields))
        return Group(bar, values) if fields else Group(bar)

    def _line(self) -> str:
        width = max(4, len(str(self.total_steps)))
        phrases = [field.phrase for field in self._fields]
        return "  ".join([f"step {self._step:>{width}}/{self.total_steps}", *phrases, f"ETA {self._eta()}"])

    def _make_fields(self) -> list[_Field]:
        latest = self._latest
        fields = []
        if "reward" in latest:
            spread = f" ±{_number(latest['reward_std'], '.2f')}" if "reward_std" in latest else ""
            fields.append(_labelled("reward", _number(latest["reward"], ".3f") + spread))
        is_online = "reward" in latest or "eval/reward" in latest
        for name, label, form in _ONLINE if is_online else _SUPERVISED:
            if name in latest:
                fields.append(_labelled(label, _number(latest[name], form)))
        if "tokens_per_second" in latest:
            value = _number(latest["tokens_per_second"], ",.0f")
            fields.append(_Field("tok/s", value, f"{value} tok/s"))
        if any(rollout for rollout, _, _ in self._times):
            rollout, update, whole = (sum(column) for column in zip(*self._times, strict=True))
            split = f"gen {_percent(rollout, whole)} update {_percent(update, whole)}"
            fields.append(_Field("time", split, split))
        return fields

    def _note_times(self, metrics: Mapping[str, float]) -> None:
        """Keep the step's seconds; without `step_time`, they are the sum of its `time/*`.

        The display sums them over a window, because only the first of several updates on a batch has a rollout.
        """
        if "time/decode" in metrics or "time/update" in metrics:
            parts = sum(_float(value) for name, value in metrics.items() if name.startswith("time/"))
            prefill, decode, update = (
                _float(metrics.get(f"time/{part}", 0.0)) for part in ("prefill", "decode", "update")
            )
            rollout = prefill + decode
            self._times.append((rollout, update, _float(metrics.get("step_time", parts))))

    def _estimate_end(self, metrics: Mapping[str, float]) -> float | None:
        """Return when the run will end, at the pace of the last calls; at the first call, at its `step_time`."""
        now = self._clock()
        self._seen.append((now, self._step))
        (then, before), pace = self._seen[0], _float(metrics.get("step_time"))
        if self._step > before:
            pace = (now - then) / (self._step - before)
        left = max(self.total_steps - self._step, 0)
        return now + pace * left if math.isfinite(pace) else None

    def _eta(self) -> str:
        ends_at = self._ends_at
        return "-:--" if ends_at is None else _duration(max(ends_at - self._clock(), 0.0))

    def _sample_cells(self, row: Mapping[str, Any]) -> tuple[str, str, str]:
        return printable(row["prompt"]), printable(row["completion"]), _number(row.get("reward"), ".3f")

    def _print(self, text: str) -> None:
        # rich prints a Text unchanged (no markup, emoji names or highlighting) and flushes it; soft_wrap keeps long
        # lines whole.
        self.console.print(Text(self._encodable(text)), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        """Escape characters that the console's encoding lacks, which would end a run on a Latin-1 terminal."""
        encoding = self.console.encoding
        return text.encode(encoding, "backslashreplace").decode(encoding)


def _has_evaluation(metrics: Mapping[str, float]) -> bool:
    return any(name.startswith("eval/") or name == "val/perplexity" for name in metrics)


def _labelled(label: str, value: str) -> _Field:
    return _Field(label, value, f"{label} {value}")


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _number(value: float | None, form: str) -> str:
    number = _float(value)
    return format(number, form) if math.isfinite(number) else "nan"


def _percent(part: float, whole: float) -> str:
    return f"{_number(part / whole, '.0%')}" if whole else "nan"


def _duration(seconds: float) -> str:
    """Return `m:ss`, or `h:mm:ss` for an hour or more."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
