"""What a person sees while a large data set is read for the first time: a bar on a terminal, else a line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN_FROM = {"bytes": 16 << 20, "texts": 50_000}  # smaller work is over before a bar is read
REPORT_SHARE = 200  # the bar is drawn anew after each such part of the whole


@contextmanager
def reported(what: str, total: int, *, unit: str) -> Iterator[Callable[[int], None]]:
    """Show on stderr that `what` is going on, and yield a function that is told how many units more are done.

    `unit` is "bytes" or "texts". Less than `SHOWN_FROM` of them is not worth a word.
    """
    if total < SHOWN_FROM[unit]:
        yield lambda _: None
    elif not sys.stderr.isatty():
        size = f"{total / 1e6:,.0f} MB" if unit == "bytes" else f"{total:,} {unit}"
        print(f"rlft: {what} ({size}); later starts find it in the cache directory", file=sys.stderr, flush=True)
        yield lambda _: None
    else:
        done = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task, waiting = progress.add_task(what, total=total), 0

            def advance(count: int) -> None:
                nonlocal waiting
                waiting += count
                if waiting * REPORT_SHARE >= total:
                    progress.update(task, advance=waiting)
                    waiting = 0

            yield advance
