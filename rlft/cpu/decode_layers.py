"""The layers of a GPT-2 for one token of many rows, compiled by numba. Importing this imports numba.

An activation is `[panels, features, width]`, and a row's features are one column of a panel: rows are the lanes of
vectors, and operations on all rows work on whole vectors.
"""

from __future__ import annotations

import numpy as np

from rlft.cpu.compiled import exp, f32, sigmoid_2u
from rlft.cpu.kernels import LANES, LONG, MIDDLE, ROWS, WIDE, address_of, four, long, middle, narrow, single, wide

VECTOR = 16  # rows that are normalised together; a panel's width is a multiple of this


def linear(x, address, bias, y, n, thread, team, is_residual):
    """Write this thread's outputs of a linear layer of n rows to y, or add them; return the range of these outputs."""
    blocks = len(bias) // ROWS
    first = blocks * thread // team * ROWS
    last = len(bias) if thread == team - 1 else blocks * (thread + 1) // team * ROWS
    products(x, address, bias, y, n, first, last, is_residual)
    return first, last


def products(x, address, bias, y, n, first, last, is_residual):
    """Write outputs first .. last - 1 of n rows; each weight is read from memory once for all panels."""
    num_in, width = x.shape[1:]
    o = first
    while o < last:
        left = last - o
        count = ROWS if left >= ROWS else 4 if left >= 4 else 1
        for panel in range(-(-n // width)):
            num_lanes, lane = min(width, n - panel * width), 0
            x_at, y_at = panel * num_in * width, panel * y.shape[1] * width
            if count == ROWS:
                while num_lanes - lane > (WIDE[0] - 1) * LANES:
                    for part in range(o, o + ROWS, WIDE[1]):
                        wide(x, x_at + lane, num_in, width, LANES, address, bias, y, y_at + lane, part, is_residual)
                    lane += WIDE[0] * LANES
                while num_lanes - lane > (MIDDLE[0] - 1) * LANES:
                    middle(x, x_at + lane, num_in, width, LANES, address, bias, y, y_at + lane, o, is_residual)
                    lane += MIDDLE[0] * LANES
                while num_lanes > lane:
                    narrow(x, x_at + lane, num_in, width, LANES, address, bias, y, y_at + lane, o, is_residual)
                    lane += LANES
            else:
                while num_lanes > lane:
                    if count == 4:
                        four(x, x_at + lane, num_in, width, LANES, address, bias, y, y_at + lane, o, is_residual)
                    else:
                        single(x, x_at + lane, num_in, width, LANES, address, bias, y, y_at + lane, o, is_residual)
                    lane += LANES
        o += count


def lanes_of(n, panel, width):
    """Return how many lanes of a panel are in use: those of its rows, rounded up to whole vectors."""
    return min(width, -(-(n - panel * width) // VECTOR) * VECTOR)


def normalise(x, w, epsilon, y, first, last, sums):
    """Write the layer norms of vectors first .. last - 1 of rows into y; w is `[2, C]`, sums `[2, width]`."""
    (C, width), mean, scale = x.shape[1:], sums[0], sums[1]
    for panel in range(first * VECTOR // width, -(-last * VECTOR // width)):
        # Unsigned: numba counts negative indices from the end, and a check for them does not vectorise.
        start = np.uint64(max(0, first * VECTOR - panel * width))
        stop = np.uint64(min(width, last * VECTOR - panel * width))
        for lane in range(start, stop):
            mean[lane] = scale[lane] = 0
        for c in range(C):
            for lane in range(start, stop):
                mean[lane] += x[panel, c, lane]
        for lane in range(start, stop):
            mean[lane] /= f32(C)
        for c in range(C):
            for lane in range(start, stop):
                scale[lane] += (x[panel, c, lane] - mean[lane]) * (x[panel, c, lane] - mean[lane])
        for lane in range(start, stop):
            scale[lane] = f32(1) / np.sqrt(scale[lane] / f32(C) + epsilon)
        for c in range(C):
            for lane in range(start, stop):
                y[panel, c, lane] = (x[panel, c, lane] - mean[lane]) * scale[lane] * w[0, c] + w[1, c]


def gelu(x, n, first, last):
    """Apply tanh GELU to features first .. last - 1."""
    width = x.shape[2]
    for panel in range(-(-n // width)):
        for o in range(first, last):
            for lane in range(lanes_of(n, panel, width)):
                x[panel, o, lane] *= sigmoid_2u(x[panel, o, lane])


def attend(w, s, layer, head, i, t, thread):
    """Write a row's attention in one head to y: over its prompt, its earlier tokens, and its new one."""
    r, width, (num_layers, num_heads, _, D, _) = s.rows[i], s.x.shape[2], s.own_keys.shape[1:]
    panel, lane, c, C = i // width, i % width, head * D, s.x.shape[1]
    length, scale, new = s.lengths[r], f32(1) / np.sqrt(f32(D)), s.inner[panel]
    of_prompt = (s.prompt_of_row[r] * num_layers + layer) * num_heads + head
    of_row = (r * num_layers + layer) * num_heads + head
    keys, values = s.own_keys[r, layer, head, t // LANES], s.own_values[r, layer, head, t]
    query, scores, mixed = s.query[thread], s.scores[thread], s.mixed[thread]
    for d in range(D):
        query[d] = new[c + d, lane] * scale
        keys[d, t % LANES], values[d] = new[C + c + d, lane], new[2 * C + c + d, lane]
    _compare(w, query, s.prompt_keys, of_prompt, length, scores, 0)
    _compare(w, query, s.own_keys, of_row, t + 1, scores, length)
    n = length + t + 1
    largest = _largest(scores, n)
    for u in range(n):
        scores[u] = exp(scores[u] - largest)
    total = _sum(scores, n)
    _mix(w, scores, 0, s.prompt_values, of_prompt, length, mixed, False)
    _mix(w, scores, length, s.own_values, of_row, t + 1, mixed, True)
    for d in range(D):
        s.y[panel, c + d, lane] = mixed[d] / total


def _compare(w, query, keys, which, n, scores, at):
    """Write products of a query with n keys to `scores`, from entry `at` on, and up to a whole vector of more.

    keys is `[.., tiles, D, LANES]`; `which` is an index into the leading dimensions, flattened.
    """
    num_tiles, D = keys.shape[-3:-1]
    size, tile, tiles, start = D * LANES, 0, -(-n // LANES), which * num_tiles * D * LANES
    while tile < tiles:
        x_at, y_at = start + tile * size, at + tile * LANES
        if tiles - tile >= LONG:
            long(keys, x_at, D, LANES, size, address_of(query), w.zeros, scores, y_at, 0, False)
            tile += LONG
        else:
            single(keys, x_at, D, LANES, size, address_of(query), w.zeros, scores, y_at, 0, False)
            tile += 1


def _mix(w, scores, at, values, which, n, mixed, is_more):
    """Write the sum of n values `[.., slots, size]`, weighted by `scores[at:]`, to `mixed`, or add it."""
    num_slots, size = values.shape[-2:]
    address, start, lane = address_of(scores) + 4 * at, which * num_slots * size, 0
    while lane < size:
        if size - lane >= LONG * LANES:
            long(values, start + lane, n, size, LANES, address, w.zeros, mixed, lane, 0, is_more)
            lane += LONG * LANES
        else:
            single(values, start + lane, n, size, LANES, address, w.zeros, mixed, lane, 0, is_more)
            lane += LANES


def _sum(x, n):
    """Return the sum of the first n entries, in four partial sums."""
    a, b, c, d, rest = f32(0), f32(0), f32(0), f32(0), n - n % 4
    for i in range(0, rest, 4):
        a, b, c, d = a + x[i], b + x[i + 1], c + x[i + 2], d + x[i + 3]
    for i in range(rest, n):
        a += x[i]
    return (a + b) + (c + d)


def _largest(x, n):
    """Return the largest of the first n entries by comparing their bits as integers: float maxima do not vectorise."""
    best, rest = np.int32(-0x80000000), np.int32(0x7FFFFFFF)
    for i in range(n):
        bits = f32(x[i]).view(np.int32)
        key = np.int32(bits ^ ((bits >> np.int32(31)) & rest))
        best = key if key > best else best
    return np.int32(best ^ ((best >> np.int32(31)) & rest)).view(f32)


CALLS = (linear, lanes_of, normalise, gelu, attend, _compare, _mix, _sum, _largest)
