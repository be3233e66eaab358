"""The loops of attention over segments of tokens and of its gradient, for numba. Importing this imports numba.

Queries are taken in blocks. Attention weights are `w[key, query]`, and a block's queries are the lanes of vectors, so
that a softmax works on whole vectors. The results for a block take 256 bytes for each key and stay in the processor's
cache up to some thousand keys. The gradient computes the weights again, from the logarithm of their normaliser (as in
FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rlft.cpu.compiled import exp, f32
from rlft.cpu.kernels import HAS_32_REGISTERS, HIGH, LANES, address_of, double, quadruple, simple, transpose

BLOCK = 64  # queries that are processed together
PAD = BLOCK + HIGH  # groups of HIGH rows that start within a block end within this


class Work(NamedTuple):
    """A thread's working memory, float32; `longest` rows hold the keys of the longest context and the longest row."""

    queries: Any  # [D, BLOCK], a block's
    weights: Any  # [longest, BLOCK]
    sums: Any  # [2, BLOCK]: two numbers for each query
    few: Any  # [HIGH, D], keys or values where there are fewer than HIGH
    mixed: Any  # [PAD, D], a block's results


class Slopes(NamedTuple):
    """Further working memory for the gradient."""

    grads: Any  # [D, BLOCK], the gradient of attention's output
    outs: Any  # [D, BLOCK], attention's output
    weights: Any  # [longest, BLOCK]
    key_grads: Any  # [longest, D], a row's
    value_grads: Any  # [longest, D]


def forward(qkv, contexts, rows, first_row, num_heads, first, last, first_head, last_head, out, normalisers):
    """Attend in contexts first .. last - 1 and their rows, heads first_head .. last_head - 1 of `num_heads`.

    Args:
        qkv: [N, 3 C] float32, queries, keys and values of tokens.
        contexts, rows: [P, 2], [B, 2] int64, the first token and the number of tokens of each.
        first_row: [P + 1] int64; context p is seen by rows first_row[p] .. first_row[p + 1] - 1.
        out: [N, C] float32, written; normalisers: [num_heads, N] float32, log sum exp of each query's scores, written.
    """
    D = out.shape[1] // num_heads
    work = _work(D, _longest(contexts) + _longest(rows))
    for p in range(first, last):
        for r in range(first_row[p] - 1, first_row[p + 1]):
            start, m = contexts[p]
            row, context = (start, m), (start, 0)  # a context is treated as a row without a context
            if r >= first_row[p]:
                row, context = (rows[r, 0], rows[r, 1]), (start, m)
            for head in range(first_head, last_head):  # a token's heads lie side by side and are fetched together
                _attend(qkv, row, context, head, work, out, normalisers)


def backward(
    qkv, contexts, rows, first_row, num_heads, first, last, first_head, last_head, out, normalisers, grad, grad_qkv
):
    """Write the gradients `[N, 3 C]` of queries, keys and values, from `grad`, that of `out`; the rest as in `forward`.

    d v = w^T d out;  d w = d out v^T;  d scores = w (d w - sum_d out d out);  d q and d k are those of a product.
    """
    D, num, size = out.shape[1] // num_heads, last_head - first_head, _longest(contexts) + _longest(rows)
    work, slopes, most = _work(D, size), _slopes(D, size), _longest(contexts) + HIGH
    key_grads, value_grads = np.empty((num, most, D), f32), np.empty((num, most, D), f32)  # the context's
    for p in range(first, last):
        key_grads[:], value_grads[:] = 0, 0
        for r in range(first_row[p], first_row[p + 1] + 1):
            start, m = contexts[p]
            row, context = (start, m), (start, 0)  # the context is last, when all rows have added to its gradient
            if r < first_row[p + 1]:
                row, context = (rows[r, 0], rows[r, 1]), (start, m)
            for h in range(num):
                added = key_grads[h], value_grads[h], key_grads[h], value_grads[h]
                if r < first_row[p + 1]:
                    slopes.key_grads[: row[1]], slopes.value_grads[: row[1]] = 0, 0
                    added = slopes.key_grads, slopes.value_grads, key_grads[h], value_grads[h]
                _pull(qkv, row, context, first_head + h, work, slopes, added, out, normalisers, grad, grad_qkv)


def _work(D, size):
    longest = size + 2 * HIGH
    queries, weights, sums = np.zeros((D, BLOCK), f32), np.empty((longest, BLOCK), f32), np.empty((2, BLOCK), f32)
    return Work(queries, weights, sums, np.zeros((HIGH, D), f32), np.empty((PAD, D), f32))


def _slopes(D, size):
    longest = size + 2 * HIGH
    grads, outs, weights = np.zeros((D, BLOCK), f32), np.zeros((D, BLOCK), f32), np.empty((longest, BLOCK), f32)
    return Slopes(grads, outs, weights, np.empty((longest, D), f32), np.empty((longest, D), f32))


def _attend(qkv, row, context, head, work, out, normalisers):
    """Attend from a row's tokens to its context and to themselves; both are (first token, number of tokens)."""
    C, D = out.shape[1], len(work.queries)
    (start, n), m, scale = row, context[1], f32(1) / np.sqrt(f32(D))
    w, own = work.weights, _rounded(m, HIGH)  # `own`: where the row's own keys begin among the weights
    for q0 in range(0, n, BLOCK):
        nq = min(BLOCK, n - q0)
        lanes = _rounded(nq, LANES)
        _turn(qkv, start + q0, head * D, nq, work.queries)
        _compare_all(qkv, row, context, C + head * D, q0, nq, work.queries, w, work.few)
        _hide_future(w, own + q0, nq)
        _normalise(w, m, own, q0 + nq, lanes, scale, work.sums)
        _mix(qkv, row, context, 2 * C + head * D, q0, nq, w, work.mixed)
        largest, total = work.sums[0], work.sums[1]
        for i in range(nq):
            factor = f32(1) / total[i]
            for d in range(D):
                out[start + q0 + i, head * D + d] = work.mixed[i, d] * factor
            normalisers[head, start + q0 + i] = largest[i] + np.log(total[i])


def _pull(qkv, row, context, head, work, slopes, added, out, normalisers, grad, grad_qkv):
    """Write a row's gradients; those of keys and values, its own and its context's, are added to `added`."""
    C, D = out.shape[1], len(work.queries)
    (start, n), m, scale = row, context[1], f32(1) / np.sqrt(f32(D))
    own, w, s = _rounded(m, HIGH), work.weights, slopes.weights
    own_keys, own_values, context_keys, context_values = added
    for q0 in range(0, n, BLOCK):
        nq = min(BLOCK, n - q0)
        lanes = _rounded(nq, LANES)
        _turn(qkv, start + q0, head * D, nq, work.queries)
        _turn(grad, start + q0, head * D, nq, slopes.grads)
        _turn(out, start + q0, head * D, nq, slopes.outs)
        _compare_all(qkv, row, context, C + head * D, q0, nq, work.queries, w, work.few)
        _hide_future(w, own + q0, nq)
        _compare_all(qkv, row, context, 2 * C + head * D, q0, nq, slopes.grads, s, work.few)
        pull, normaliser = work.sums[0], work.sums[1]
        for i in range(lanes):
            pull[i], normaliser[i] = 0, normalisers[head, start + q0 + i] if i < nq else f32(0)
        for d in range(D):
            for i in range(lanes):
                pull[i] += slopes.outs[d, i] * slopes.grads[d, i]
        _differentiate(w, s, 0, m, lanes, scale, pull, normaliser)
        _differentiate(w, s, own, own + q0 + nq, lanes, scale, pull, normaliser)
        for j in range(own + q0 + nq, own + _rounded(q0 + nq, HIGH)):  # keys of the next block, or no keys
            w[j], s[j] = 0, 0
        token = start + q0
        _gather(w, 0, m, -1, grad, token, head * D, nq, context_values)
        _gather(s, 0, m, -1, qkv, token, head * D, nq, context_keys)
        _gather(w, own, q0 + nq, q0, grad, token, head * D, nq, own_values)
        _gather(s, own, q0 + nq, q0, qkv, token, head * D, nq, own_keys)
        _mix(qkv, row, context, C + head * D, q0, nq, s, work.mixed)
        for i in range(nq):
            for d in range(D):
                grad_qkv[token + i, head * D + d] = work.mixed[i, d]
    for i in range(n):
        for d in range(D):
            grad_qkv[start + i, C + head * D + d] = own_keys[i, d]
            grad_qkv[start + i, 2 * C + head * D + d] = own_values[i, d]


def _longest(segments):
    longest = 0
    for i in range(len(segments)):
        longest = max(longest, segments[i, 1])
    return longest


def _rounded(n, multiple):
    return -(-n // multiple) * multiple


def _turn(x, start, column, n, y):
    """Write D columns of n rows of x into the first n lanes of y `[D, BLOCK]`; the other lanes stay as they are."""
    D, row = len(y), x.shape[1]
    address, to = address_of(x) + 4 * (start * row + column), address_of(y)
    if n < LANES:
        for d in range(D):
            for i in range(n):
                y[d, i] = x[start + i, column + d]
    else:
        for i in range(0, n, LANES):
            i = min(i, n - LANES)  # the last lanes overlap with those before
            for d in range(0, D, LANES):
                transpose(address + 4 * (i * row + d), row, to + 4 * (d * BLOCK + i), BLOCK)


def _compare_all(x, row, context, column, q0, nq, queries, scores, few):
    """Write the products of a block's queries with columns of x: the context's, then the row's up to the block."""
    (start, m), lanes = context, _rounded(nq, LANES)
    _compare(x, start, column, m, -1, queries, scores, 0, lanes, few)
    _compare(x, row[0], column, q0 + nq, q0, queries, scores, _rounded(m, HIGH), lanes, few)


def _compare(x, start, column, n, q0, queries, scores, at, lanes, few):
    """Write the products of n rows of x with the queries into `scores`, from row `at` on.

    Queries before j - q0 do not attend to row j, whose products may be left out for them; with q0 = -1 all attend.
    """
    D, width = len(queries), x.shape[1]
    address, y = address_of(x) + 4 * (start * width + column), address_of(scores) + 4 * at * BLOCK
    if n < HIGH:
        for j in range(n):
            for d in range(D):
                few[j, d] = x[start + j, column + d]
        _strip(address_of(few), D, 1, address_of(queries), BLOCK, D, y, BLOCK, lanes, False)
    else:
        for j in range(0, n, HIGH):
            j = min(j, n - HIGH)  # the last rows overlap with those before, and get the same values again
            i = 0 if q0 < 0 else max(0, j - q0) // LANES * LANES
            inputs, end = address_of(queries) + 4 * i, y + 4 * (j * BLOCK + i)
            _strip(address + 4 * j * width, width, 1, inputs, BLOCK, D, end, BLOCK, lanes - i, False)


def _mix(x, row, context, column, q0, nq, w, mixed):
    """Write for each query of a block the w-weighted sum of x's columns over its context and the row up to it."""
    D, width, own = mixed.shape[1], x.shape[1], _rounded(context[1], HIGH)
    of_context = address_of(x) + 4 * (context[0] * width + column)
    of_row = address_of(x) + 4 * (row[0] * width + column)
    for i in range(0, nq, HIGH):
        weights, y, seen = address_of(w) + 4 * i, address_of(mixed) + 4 * i * D, q0 + min(i + HIGH, nq)
        _strip(weights, 1, BLOCK, of_context, width, context[1], y, D, D, False)
        _strip(weights + 4 * own * BLOCK, 1, BLOCK, of_row, width, seen, y, D, D, True)


def _gather(w, at, n, q0, x, start, column, nq, y):
    """Add to each of n keys the sum of x's columns over a block's queries, weighted by w's rows from `at` on.

    Rows after the first n, up to a multiple of `HIGH`, get meaningless values. q0 is as in `_compare`.
    """
    D, width = y.shape[1], x.shape[1]
    for j in range(0, n, HIGH):
        i = 0 if q0 < 0 else max(0, j - q0)
        weights, inputs = address_of(w) + 4 * ((at + j) * BLOCK + i), address_of(x) + 4 * ((start + i) * width + column)
        _strip(weights, BLOCK, 1, inputs, width, nq - i, address_of(y) + 4 * j * D, D, D, True)


def _hide_future(scores, at, n):
    for j in range(n):
        for i in range(j):
            scores[at + j, i] = -np.inf


def _normalise(w, m, own, n, lanes, scale, sums):
    """Turn m scores and, from row `own` on, n more into exp(scale (score - largest)).

    Writes scale * largest and the sum over all keys, for each query, into `sums`.
    """
    best, total = sums[0], sums[1]
    for i in range(lanes):
        best[i], total[i] = -np.inf, 0
    for part in range(2):
        for j in range(own if part else 0, own + n if part else m):
            for i in range(lanes):
                best[i] = w[j, i] if w[j, i] > best[i] else best[i]
    for i in range(lanes):
        best[i] *= scale
    for part in range(2):
        for j in range(own if part else 0, own + n if part else m):
            for i in range(lanes):
                w[j, i] = exp(w[j, i] * scale - best[i])
                total[i] += w[j, i]


def _differentiate(w, s, first, last, lanes, scale, pull, normaliser):
    """Turn scores into weights, and the weights' gradients into those of the unscaled scores."""
    for j in range(first, last):
        for i in range(lanes):
            w[j, i] = exp(w[j, i] * scale - normaliser[i])
            # Gradients of hidden weights were not computed, and may be anything.
            s[j, i] = w[j, i] * (s[j, i] - pull[i]) * scale if w[j, i] != 0 else f32(0)


def _strip(a, a_row, a_step, b, b_row, num, c, c_row, lanes, is_added):
    """Compute `HIGH` rows of a product of two activations, in as wide vectors as possible (`rlft.cpu.kernels`)."""
    i = 0
    if HAS_32_REGISTERS:
        while lanes - i >= 4 * LANES:
            quadruple(a, a_row, a_step, b + 4 * i, b_row, num, c + 4 * i, c_row, is_added)
            i += 4 * LANES
    while lanes - i >= 2 * LANES:
        double(a, a_row, a_step, b + 4 * i, b_row, num, c + 4 * i, c_row, is_added)
        i += 2 * LANES
    while i < lanes:
        simple(a, a_row, a_step, b + 4 * i, b_row, num, c + 4 * i, c_row, is_added)
        i += LANES


CALLS = (_work, _slopes, _attend, _pull, _longest, _rounded, _compare_all, _hide_future, _normalise, _differentiate)
APART = (_strip, _turn, _compare, _mix, _gather)  # they copy, and call kernels that define each operation
