"""Progress while a large data set is read for the first time: a bar on a terminal, otherwise one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN_FROM = {"bytes": 16 << 20, "texts": 50_000}  # less work is over too soon to be shown
REPORT_SHARE = 200  # the bar is redrawn each time that this fraction of the total (1/200) is done


@contextmanager
def reported(what: str, total: int, *, unit: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of `what` on stderr; yields a function to call with the number of units just done.

    `unit` is "bytes" or "texts". Nothing is shown for a total below `SHOWN_FROM`.
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
