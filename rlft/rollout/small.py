"""Decoding for very small GPT-2s on the CPU, compiled: there torch spends its time on calls, not on arithmetic.

A token step of 64 rows of a 61 k parameter policy takes torch 1.1 ms on two threads, and the same loop, compiled by
numba, 0.14 ms. numba is an optional dependency (the extra `fast`) and takes a while to import, so the first `decode`
imports it; what it compiles, everything below `_compiled`, is plain Python until then.

Each sum runs over one row's own numbers, in an order that their count alone decides: a row's bits depend neither on
the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from rlft import compiled
from rlft.compiled import exp, f32, sigmoid_2u
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.rollout.cache import PrefixCache
from rlft.rollout.sampling import Sampling

MAX_PARAMETERS = 1_000_000  # there it is still 1.6 times as fast at 256 rows; at three times as many, 1.2
BLOCK = 8  # rows that a thread takes through a layer together, while the layer's weights are in the nearest cache


class _Weights(NamedTuple):
    """A policy's parameters, contiguous float32; a matrix is [in + 1, out], its bias the last row."""

    wte: np.ndarray  # [V, C]
    wpe: np.ndarray  # [N, C]
    ln_1: np.ndarray  # [L, 2, C]
    c_attn: np.ndarray  # [L, C + 1, 3 C]
    attn_proj: np.ndarray  # [L, C + 1, C]
    ln_2: np.ndarray  # [L, 2, C]
    c_fc: np.ndarray  # [L, C + 1, 4 C]
    mlp_proj: np.ndarray  # [L, 4 C + 1, C]
    ln_f: np.ndarray  # [2, C]
    head: np.ndarray  # [C + 1, V]


def fits(policy: CausalLM, sampling: Sampling, device: torch.device) -> TypeGuard[GPT2]:
    """Return whether `decode` does what the torch loop does for this policy, and is faster."""
    return (
        type(policy) is GPT2
        and policy.mask_id is None
        and policy.num_parameters() <= MAX_PARAMETERS  # the tied embedding is among them: no vocabulary is huge
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in policy.parameters())
        and device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and (sampling.top_k, sampling.top_p, sampling.min_new_tokens) == (0, 1.0, 0)
        and compiled.is_possible()
    )


@torch.no_grad()
def decode(
    policy: GPT2,
    prefix: PrefixCache,
    first_hidden: Tensor,
    prompt_of_row: Tensor,
    room: Tensor,
    draws: Tensor | None,
    *,
    max_new: int,
    temperature: float,
    eos_id: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Continue B rows from their prompts' keys and values; a row ends at `eos_id`, `max_new` tokens, or its room.

    Arguments:
        prefix: keys and values of P prompts, each `[P, H, S, D]`; what lies beyond a prompt's length is not read.
        first_hidden: [B, C] float32, after `ln_f`, that predicts each row's first token.
        prompt_of_row: [B] int64; room: [B] int64, >= 1, new tokens that have a position.
        draws: [B, max_new] float64 uniforms for the rule of `rlft.rollout.sampling.sample`; None takes the first of
            the largest logits.

    Returns:
        ids [B, max_new] int64 and their logprobs [B, max_new] float32 at the temperature (0 after a row's end), token
        counts [B] int64, and who drew the end token, [B] bool.
    """
    num_rows, num_slots, threads = len(first_hidden), prefix.keys[0].shape[2], torch.get_num_threads()
    stacked = torch.stack([torch.stack(prefix.keys, dim=1), torch.stack(prefix.values, dim=1)], dim=1)
    prompt_cache = stacked.transpose(-2, -1).contiguous().numpy()  # [P, 2, L, H, D, S]: the loops run over slots
    ids, logprobs = torch.zeros(num_rows, max_new, dtype=torch.int64), torch.zeros(num_rows, max_new)
    counts, stopped = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.bool)
    hidden = first_hidden.clone(memory_format=torch.contiguous_format)  # it is overwritten
    draws = draws.contiguous() if draws is not None else torch.empty(num_rows, 0, dtype=torch.float64)
    lengths = prefix.lengths[prompt_of_row]
    # Compiled code does not check its indices.
    assert bool((lengths + room.clamp(max=max_new) <= policy.context_length).all()), "tokens without a position"
    rows = [tensor.numpy() for tensor in (lengths, hidden, room, draws, ids, logprobs, counts, stopped)]
    weights, decode_rows, prompts = _weights(policy), _compiled(), prompt_of_row.numpy()
    epsilon, end = f32(policy.config.layer_norm_epsilon), -1 if eos_id is None else eos_id
    block = min(BLOCK, -(-num_rows // threads))

    def decode_block(start: int) -> None:
        these = slice(start, start + block)
        past = prompt_cache[prompts[these]]
        cache = np.empty((*past.shape[:-1], num_slots + max_new), dtype=np.float32)
        cache[..., :num_slots] = past
        decode_rows(weights, epsilon, f32(temperature), end, cache, *(array[these] for array in rows))

    compiled.in_threads([partial(decode_block, start) for start in range(0, num_rows, block)])
    return ids, logprobs, counts, stopped


def _weights(policy: GPT2) -> _Weights:
    def joined(module: Any) -> Tensor:
        return torch.cat([torch.atleast_2d(module.weight.t()), module.bias[None]])

    def stacked(name: str) -> np.ndarray:
        return torch.stack([joined(block.get_submodule(name)) for block in policy.h]).numpy()

    head = policy.head_weight.t()
    return _Weights(
        policy.wte.weight.numpy(), policy.wpe.weight.numpy(),
        stacked("ln_1"), stacked("attn.c_attn"), stacked("attn.c_proj"),
        stacked("ln_2"), stacked("mlp.c_fc"), stacked("mlp.c_proj"),
        joined(policy.ln_f).numpy(), torch.cat([head, torch.zeros_like(head[:1])]).numpy(),
    )  # fmt: skip


@cache
def _compiled() -> Callable[..., None]:
    """Return `_decode_rows`; its sums may be reordered, so that they vectorise. Infinities and NaNs stay."""
    options = compiled.options("reassoc", "contract", "nsz", "arcp")
    return compiled.function(_decode_rows, options, calls=(_normalise, _linear, _attend, _gelu, _choose, _largest))


def _decode_rows(w, epsilon, temperature, end, cache, lengths, y, room, draws, ids, logprobs, counts, stopped):
    """Decode R rows into `ids`, `logprobs` [R, max_new], `counts`, `stopped` [R]; `cache` is [R, 2, L, H, D, slots].

    Rows that go on are the first n of the working arrays; `rows` tells which they are in the cache and the results.
    """
    (num_rows, max_new), C = ids.shape, y.shape[1]
    x, inner = np.empty((num_rows, C), np.float32), np.empty((num_rows, 4 * C), np.float32)
    logits = np.empty((num_rows, len(w.wte)), np.float32)
    scratch = np.empty(max(len(w.wte), cache.shape[5]), np.float32)
    rows, n = np.arange(num_rows), num_rows
    for t in range(max_new):
        _linear(y, w.head, logits, n, False)
        n, num_decoded = 0, n
        for i in range(num_decoded):
            r = rows[i]
            draw = draws[r, t] if draws.shape[1] else -1.0
            token, logprobs[r, t] = _choose(logits[i], temperature, draw, scratch)
            ids[r, t], counts[r], stopped[r] = token, t + 1, token == end
            if not stopped[r] and t + 1 < min(max_new, room[r]):
                for c in range(C):
                    x[n, c] = w.wte[token, c] + w.wpe[lengths[r] + t, c]
                rows[n] = r
                n += 1
        if n == 0:
            return
        for i in range(len(w.ln_1)):
            _normalise(x, w.ln_1[i], epsilon, y, n)
            _linear(y, w.c_attn[i], inner, n, False)
            for j in range(n):
                r = rows[j]
                _attend(inner[j], cache[r, 0, i], cache[r, 1, i], lengths[r] + t, scratch, y[j])
            _linear(y, w.attn_proj[i], x, n, True)
            _normalise(x, w.ln_2[i], epsilon, y, n)
            _linear(y, w.c_fc[i], inner, n, False)
            _gelu(inner, n)
            _linear(inner, w.mlp_proj[i], x, n, True)
        _normalise(x, w.ln_f, epsilon, y, n)


def _normalise(x, w, epsilon, y, n):
    """Write the layer norms of x `[n, C]` into y; w is `[2, C]`."""
    C = x.shape[1]
    for r in range(n):
        mean, variance = f32(0), f32(0)
        for c in range(C):
            mean += x[r, c] / f32(C)
        for c in range(C):
            variance += (x[r, c] - mean) * (x[r, c] - mean) / f32(C)
        scale = f32(1) / np.sqrt(variance + epsilon)
        for c in range(C):
            y[r, c] = (x[r, c] - mean) * scale * w[0, c] + w[1, c]


def _linear(x, w, y, n, is_residual):
    """Write x `[n, in]` times w `[in + 1, out]`, bias included, into y, or add it to y.

    Eight inputs at a time, because y would otherwise be read and written for each; the rows inside them, so that the
    weights are read from the nearest cache for all rows but the first.
    """
    num_in, num_out = len(w) - 1, w.shape[1]
    for r in range(n):
        for o in range(num_out):
            y[r, o] = y[r, o] + w[num_in, o] if is_residual else w[num_in, o]
    for i in range(0, num_in - 7, 8):
        for r in range(n):
            a, b, c, d = x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3]
            e, f, g, h = x[r, i + 4], x[r, i + 5], x[r, i + 6], x[r, i + 7]
            for o in range(num_out):
                low = a * w[i, o] + b * w[i + 1, o] + c * w[i + 2, o] + d * w[i + 3, o]
                high = e * w[i + 4, o] + f * w[i + 5, o] + g * w[i + 6, o] + h * w[i + 7, o]
                y[r, o] += low + high
    for i in range(num_in - num_in % 8, num_in):
        for r in range(n):
            a = x[r, i]
            for o in range(num_out):
                y[r, o] += a * w[i, o]


def _attend(qkv, keys, values, position, scores, y):
    """Write a row's attention `[C]` into y, and its new key and value into `[H, D, slots]` at `position`."""
    num_heads, width, _ = keys.shape
    C, n, scale = num_heads * width, position + 1, f32(1) / np.sqrt(f32(width))
    for h in range(num_heads):
        for t in range(n):
            scores[t] = 0
        for d in range(width):
            c = h * width + d
            keys[h, d, position], values[h, d, position] = qkv[C + c], qkv[2 * C + c]
            q = qkv[c] * scale
            for t in range(n):
                scores[t] += q * keys[h, d, t]
        largest, total = _largest(scores, n), f32(0)
        for t in range(n):
            scores[t] = exp(scores[t] - largest)
            total += scores[t]
        for d in range(width):
            mixed = f32(0)
            for t in range(n):
                mixed += scores[t] * values[h, d, t]
            y[h * width + d] = mixed / total


def _gelu(x, n):
    """Apply tanh GELU to x `[n, 4 C]`."""
    for r in range(n):
        for c in range(x.shape[1]):
            x[r, c] *= sigmoid_2u(x[r, c])


def _choose(logits, temperature, draw, scratch):
    """Return the token of a uniform draw, or the likeliest for a negative one, and its log probability."""
    V = len(logits)
    for v in range(V):
        logits[v] /= temperature
    largest, total = _largest(logits, V), 0.0
    for v in range(V):
        scratch[v] = exp(logits[v] - largest)
        total += scratch[v]
    token, v, cumulative = 0, 0, 0.0
    if draw < 0:
        while logits[token] < largest:
            token += 1
    else:
        # Rounding may leave the sum short of the target; then it is the last token that has a probability.
        while v < V and cumulative <= draw * total:
            cumulative += scratch[v]
            token = v if scratch[v] > 0 else token
            v += 1
    return token, f32(logits[token] - largest - np.log(total))


def _largest(x, n):
    """Return the largest of the first n, by their bits in the order of integers: float maxima would not vectorise."""
    best, rest = np.int32(-0x80000000), np.int32(0x7FFFFFFF)
    for i in range(n):
        bits = f32(x[i]).view(np.int32)
        key = np.int32(bits ^ ((bits >> np.int32(31)) & rest))
        best = key if key > best else best
    return np.int32(best ^ ((best >> np.int32(31)) & rest)).view(f32)
