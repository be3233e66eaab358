"""The decode loop of `rlft.cpu.decode`, compiled by numba. Importing this imports numba.

A team of threads shares the work of each step and meets wherever one thread needs what another wrote. Every sum runs
over one row's own numbers, in an order that depends on their count alone: a row's bits depend neither on the rows
beside it nor on the number of threads. `_score`, `_weigh` and `_choose` are the rule of `rlft.rollout.sampling.choose`
without filters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from rlft.cpu import compiled, decode_layers
from rlft.cpu.compiled import exp, f32
from rlft.cpu.decode_layers import VECTOR, attend, gelu, lanes_of, linear, normalise, products
from rlft.cpu.kernels import add_atomically, let_others_run, read_atomically

BLOCK = 48  # tokens of the vocabulary whose probabilities are summed first; a multiple of `rlft.cpu.kernels.ROWS`
MET, STOP = 8, 16  # entries of `sync` that are in use, besides entry 0
PATIENCE = 4096  # how often a thread checks whether all have arrived, before it yields the processor


def decode(w, s, epsilon, temperature, end, thread, team):
    """Decode the rows of a state `s` (`rlft.cpu.decode_state.State`), as thread `thread` of `team`."""
    num_layers, num_heads = s.own_keys.shape[1:3]
    n = len(s.rows)
    for t in range(s.ids.shape[1]):
        _score(w, s, n, temperature, thread, team)
        _meet(s.sync, team)
        _weigh(s, n, thread, team)
        _meet(s.sync, team)
        for i in range(n * thread // team, n * (thread + 1) // team):
            _choose(s, i, t, end, thread)
        _meet(s.sync, team)
        if thread == 0:
            s.num_open[0] = _kept(s, n, t) if read_atomically(s.sync, STOP) == 0 else 0
        _meet(s.sync, team)
        n = s.num_open[0]
        if n == 0:
            return
        vectors = -(-n // VECTOR)
        first, last = vectors * thread // team, vectors * (thread + 1) // team
        for i in range(first * VECTOR, min(n, last * VECTOR)):
            _embed(w, s, i, t)
        for layer in range(num_layers):
            normalise(s.x, w.ln_1[layer], epsilon, s.y, first, last, s.sums[thread])
            _meet(s.sync, team)
            linear(s.y, w.matrices[layer, 0], w.c_attn[layer], s.inner, n, thread, team, False)
            _meet(s.sync, team)
            # Head by head, and within a head all rows: a prompt's rows are adjacent, so its keys stay in a near cache.
            for item in range(num_heads * n * thread // team, num_heads * n * (thread + 1) // team):
                attend(w, s, layer, item // n, item % n, t, thread)
            _meet(s.sync, team)
            linear(s.y, w.matrices[layer, 1], w.attn_proj[layer], s.x, n, thread, team, True)
            _meet(s.sync, team)
            normalise(s.x, w.ln_2[layer], epsilon, s.y, first, last, s.sums[thread])
            _meet(s.sync, team)
            outputs = linear(s.y, w.matrices[layer, 2], w.c_fc[layer], s.inner, n, thread, team, False)
            gelu(s.inner, n, outputs[0], outputs[1])
            _meet(s.sync, team)
            linear(s.inner, w.matrices[layer, 3], w.mlp_proj[layer], s.x, n, thread, team, True)
            _meet(s.sync, team)
        normalise(s.x, w.ln_f, epsilon, s.y, first, last, s.sums[thread])
        _meet(s.sync, team)


def _meet(sync, team):
    """Wait until all threads of the team are here. `sync` counts the threads that are, and the meetings."""
    if team > 1:
        meeting = read_atomically(sync, MET)
        if add_atomically(sync, 0, 1) == team - 1:
            sync[0] = 0
            add_atomically(sync, MET, 1)
        else:
            looks = 0
            while read_atomically(sync, MET) == meeting:
                looks += 1
                if looks > PATIENCE:
                    let_others_run()


def _score(w, s, n, temperature, thread, team):
    """Write this thread's blocks of the logits, divided by the temperature, and the largest logit of each block."""
    V, width = s.logits.shape[1:]
    blocks = -(-V // BLOCK)
    for block in range(blocks * thread // team, blocks * (thread + 1) // team):
        first, last = block * BLOCK, min(V, (block + 1) * BLOCK)
        products(s.y, w.head, w.zeros, s.logits, n, first, last, False)
        for panel in range(-(-n // width)):
            largest, lanes = s.largest[block, panel], lanes_of(n, panel, width)
            for lane in range(lanes):
                largest[lane] = -np.inf
            for v in range(first, last):
                logits = s.logits[panel, v]
                for lane in range(lanes):
                    logits[lane] /= temperature
                    largest[lane] = logits[lane] if logits[lane] > largest[lane] else largest[lane]


def _weigh(s, n, thread, team):
    """Write each row's largest logit, and for this thread's blocks the mass, the sum of exp(logit - largest)."""
    (V, width), blocks = s.logits.shape[1:], len(s.mass)
    for panel in range(-(-n // width)):
        top, lanes = s.top[thread, panel], lanes_of(n, panel, width)
        for lane in range(lanes):
            top[lane] = -np.inf
        for block in range(blocks):
            largest = s.largest[block, panel]
            for lane in range(lanes):
                top[lane] = largest[lane] if largest[lane] > top[lane] else top[lane]
        for block in range(blocks * thread // team, blocks * (thread + 1) // team):
            mass = s.mass[block, panel]
            for lane in range(lanes):
                mass[lane] = 0.0
            for v in range(block * BLOCK, min(V, (block + 1) * BLOCK)):
                logits = s.logits[panel, v]
                for lane in range(lanes):
                    mass[lane] += exp(logits[lane] - top[lane])


def _choose(s, i, t, end, thread):
    """Write the t-th token of the i-th row and its logprob; without draws this is the likeliest token."""
    (V, width), r = s.logits.shape[1:], s.rows[i]
    panel, lane, block, token, last = i // width, i % width, 0, 0, len(s.mass) - 1
    logits, top, total = s.logits[panel], s.top[thread, panel, lane], 0.0
    for b in range(len(s.mass)):
        total += s.mass[b, panel, lane]
    if s.draws.shape[1] == 0:
        while block < last and s.largest[block, panel, lane] < top:
            block += 1
        token = block * BLOCK
        while token < V - 1 and logits[token, lane] < top:
            token += 1
    else:
        # If rounding leaves the sum below the target, the token is the last one with a probability above 0.
        target, before, cumulative = s.draws[r, t] * total, 0.0, 0.0
        for b in range(len(s.mass)):
            mass = s.mass[b, panel, lane]
            if mass > 0 and cumulative <= target:
                block, before, cumulative = b, cumulative, cumulative + mass
        cumulative, v = before, block * BLOCK
        token = v
        while v < min(V, (block + 1) * BLOCK) and cumulative <= target:
            probability = exp(logits[v, lane] - top)
            cumulative += probability
            token = v if probability > 0 else token
            v += 1
    s.ids[r, t], s.counts[r], s.stopped[r] = token, t + 1, token == end
    s.logprobs[r, t] = f32(logits[token, lane] - top - np.log(total))


def _kept(s, n, t):
    """Move the rows that go on to the front, and return how many they are."""
    kept = 0
    for i in range(n):
        r = s.rows[i]
        if not s.stopped[r] and t + 1 < min(s.ids.shape[1], s.room[r]):
            s.rows[kept] = r
            kept += 1
    return kept


def _embed(w, s, i, t):
    width, r = s.x.shape[2], s.rows[i]
    panel, lane, token, position = i // width, i % width, s.ids[r, t], s.lengths[r] + t
    for c in range(s.x.shape[1]):
        s.x[panel, c, lane] = w.wte[token, c] + w.wpe[position, c]


@cache
def function() -> Callable[..., None]:
    """Return `decode`, compiled without reordering of sums, which would make bits depend on the number of lanes."""
    calls = (_meet, _score, _weigh, _choose, _kept, _embed, *decode_layers.CALLS)
    return compiled.function(decode, compiled.options("contract", "nsz"), calls=calls, apart=(products,))
