"""Counter-based randomness: every draw is a pure function of a seed and of counts, such as step, prompt and member.

NumPy's Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a counter-based generator:
its output depends only on a 128-bit key and a 256-bit counter. The key is (seed, stream), and the counter starts at
(0, a, b, c), so the draws of different (a, b, c) never overlap. No state is kept between draws, and none has to be
saved: batch size, order, rank, world size and resume change no draw.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np


def generator(seed: int, stream: str, a: int = 0, b: int = 0, c: int = 0) -> np.random.Generator:
    """Return the generator for `stream` (a name such as "order" or "sample") at the counts `(a, b, c)`, each >= 0."""
    if min(seed, a, b, c) < 0:  # NumPy before 2 would read a negative number as a large one
        raise OverflowError(f"a seed and counts are at least 0, got {(seed, a, b, c)}")
    key = np.array([seed, zlib.crc32(stream.encode())], dtype=np.uint64)
    counter = np.array([0, a, b, c], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def random_rows(seed: int, stream: str, counts: list[tuple[int, int, int]], *, size: int) -> np.ndarray:
    """Return uniforms in [0, 1), float64 `[len(counts), size]`; row i is that of `generator(seed, stream, *counts[i])`.

    One generator is set to the counter of each row in turn, which takes a third of the time of making a new one.
    """
    rows, drawing = np.empty((len(counts), size)), generator(seed, stream)
    state: dict[str, Any] = dict(drawing.bit_generator.state)  # the state before the first draw
    for row, count in zip(rows, counts, strict=True):
        state["state"]["counter"][1:] = count
        drawing.bit_generator.state = state
        drawing.random(out=row)
    return rows


def order(num_items: int, *, seed: int, start: int, count: int) -> np.ndarray:
    """Return items `start .. start + count - 1` of an endless sequence of shuffled epochs over `num_items` items.

    Each epoch is a permutation drawn from (seed, epoch). The batch of step n is therefore `order(N, seed=s, start=n *
    size, count=size)`, whatever was drawn before. Returns int64 `[count]`.
    """
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    positions = np.arange(start, start + count)
    picked = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // num_items):
        here = positions // num_items == epoch
        picked[here] = _epoch(num_items, seed, int(epoch))[positions[here] % num_items]
    return picked


@functools.lru_cache(maxsize=2)  # a batch may lie in two epochs; a permutation of a million items takes 20 ms
def _epoch(num_items: int, seed: int, epoch: int) -> np.ndarray:
    permutation = generator(seed, "order", epoch).permutation(num_items)
    permutation.flags.writeable = False
    return permutation
