"""Metrics: sums and counts over micro-batches and ranks, and the JSONL files that hold every row."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator  # takes a while to import


class Metrics:
    """Averages whose denominator is the number of counted entries in the whole batch, over micro-batches and ranks.

    Sums are kept on the device, so that adding one does not wait for it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the entries of `x` where `mask` is true (all of them without a mask)."""
        x = x.detach().double()
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
        self._sums[name] = self._sums.get(name, 0.0) + torch.where(mask, x, 0.0).sum()
        self._counts[name] = self._counts.get(name, 0.0) + mask.sum().double()

    def add_max(self, name: str, x: Tensor, mask: Tensor | None = None) -> None:
        """Keep the largest entry of `x` where `mask` is true (of all of them without a mask)."""
        x = x.detach().double()
        largest = x.max() if mask is None else torch.where(mask.bool(), x, -torch.inf).max()
        self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Return every mean and maximum over all ranks; a mean over nothing is left out."""
        return self._row(
            accelerator.device,
            summed=lambda x: accelerator.reduce(x, reduction="sum"),
            largest=lambda x: accelerator.gather(x[None]).amax(dim=0),
        )

    def local(self) -> dict[str, float]:
        """Return this rank's means and maxima alone."""
        return self._row(torch.device("cpu"), summed=lambda x: x, largest=lambda x: x)

    def _row(
        self, device: torch.device, *, summed: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Reduce all sums and counts at once, and all maxima at once: two waits for the device in all."""
        row: dict[str, float] = {}
        if self._sums:
            pairs = [torch.stack([x.to(device) for x in values.values()]) for values in (self._sums, self._counts)]
            totals, counts = summed(torch.stack(pairs)).tolist()
            found = zip(self._sums, totals, counts, strict=True)
            row = {name: total / count for name, total, count in found if count > 0}
        if self._maxima:
            maxima = largest(torch.stack([x.to(device) for x in self._maxima.values()])).tolist()
            row |= dict(zip(self._maxima, maxima, strict=True))
        return row


class Clock:
    """Splits a step's wall time into named parts, in seconds; on a GPU a part ends when its work is done there."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.seconds = device, dict[str, float]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device is not None and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return `time/<name>` for what was measured since the last call, and start again."""
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = {}
        return taken


@contextmanager
def traced(path: Path | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; it traces the third and fourth to `path` (None: no trace)."""
    if path is None:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(path))
    ) as profiler:
        yield profiler.step


class JsonlFile:
    """An append-only file of JSON rows, each with a `step`; a resumed run cuts it back to its checkpoint first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict) -> None:
        """Append one row. Numbers that are not finite are written as null, so that any JSON reader takes the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row), ensure_ascii=False) + "\n")

    def truncate_after(self, step: int) -> dict:
        """Drop the rows of later steps, and a last line that a kill left half written; return the last that stays."""
        if not self.path.exists():
            return {}
        kept: list[bytes] = []
        for line in self.path.read_bytes().split(b"\n"):  # str.splitlines would also cut at U+2028 inside a text
            try:
                if json.loads(line)["step"] > step:
                    break
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
            kept.append(line + b"\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, self.path)
        return json.loads(kept[-1]) if kept else {}


def _finite(value: Any) -> Any:
    """Return `value` with None for every float that is not finite, in dicts and lists too."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
