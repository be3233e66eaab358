"""Decoding on a GPU by CUDA graphs: a step is one launch, where Python would launch some three hundred kernels.

A graph repeats the same kernels on the same addresses. So keys and values lie in arrays of a fixed size, the slot that
a step writes is a number on the device, and a mask, which each step opens by one slot, hides those that are empty.
Attention reads hidden slots too, so it is given only some more than are filled, and rows that ended are left behind;
both take another capture, and are done where they save more than that costs.

Graphs are captured anew for each rollout. Optimizers update weights in place, so they would stay right; but their cache
would have to stay too, and it is the largest thing there is, whose memory the update wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rlft.models.base import CacheShape, CausalLM
from rlft.rollout.cache import PrefixCache, prompt_slots

if TYPE_CHECKING:
    from rlft.rollout.engine import _Active
    from rlft.rollout.table import Table

CAPTURE_BYTES = 80e9  # that a GPU could read in the time of a capture: 20 ms at 4 TB/s; benchmarks/gpu.py measures it
ALIGNMENT = 16  # torch's memory-efficient attention copies a mask whose rows begin elsewhere


def fits(policy: CausalLM, device: torch.device) -> bool:
    """Return whether `decode` can stand in for the plain loop: on a GPU, where attention is left to the cache."""
    return device.type == "cuda" and policy.takes_packed


class StaticCache:
    """Keys and values of B rows, `[prompt slots | completion slots]`, for steps that know nothing of the host.

    Memory: 2 * layers * B * H * (S + max_new_tokens) * D elements; each row has a copy of its prompt's.
    """

    segments = None

    def __init__(self, prefix: PrefixCache, prompt_of_row: Tensor, *, max_new_tokens: int, shape: CacheShape) -> None:
        num_rows, self.used = len(prompt_of_row), prefix.keys[0].shape[2]
        self.num_slots = _aligned(self.used + max_new_tokens)
        self.length = self.used  # slots that attention reads
        self.slot = torch.tensor([self.used], device=prompt_of_row.device)  # that the next token goes to: `used`
        # The rest is zeros: nothing may be nan where the mask hides it.
        rest = (0, 0, 0, self.num_slots - self.used)
        self.keys = [F.pad(keys.index_select(0, prompt_of_row), rest) for keys in prefix.keys]
        self.values = [F.pad(values.index_select(0, prompt_of_row), rest) for values in prefix.values]
        assert len(self.keys) == shape.num_layers
        # [B, 1, 1, slots], added to the scores, in the dtype of the queries (autocast's where it is on)
        self.bias = self.keys[0].new_full((num_rows, 1, 1, self.num_slots), -torch.inf)
        of_prompt = prompt_slots(prefix.lengths[prompt_of_row], self.used)
        self.bias[:, 0, 0, : self.used].masked_fill_(of_prompt, 0.0)

    @property
    def slot_bytes(self) -> int:
        """What one slot of all rows and layers takes."""
        return 2 * len(self.keys) * self.keys[0][:, :, 0].numel() * self.keys[0].element_size()

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0) -> Tensor:
        if queries.shape[2] != 1:
            raise ValueError(f"decoding goes one token at a time, got {queries.shape[2]}")
        if layer == 0:
            self.bias.index_fill_(3, self.slot, 0.0)
        self.keys[layer].index_copy_(2, self.slot, keys)
        self.values[layer].index_copy_(2, self.slot, values)
        if layer == len(self.keys) - 1:
            self.slot += 1
        keys, values = self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.bias[..., : self.length], dropout_p=dropout
        )

    def keep(self, rows: Tensor) -> None:
        """Keep `rows` (int64 indices) and drop the others."""
        for own in (self.keys, self.values):
            for layer, whole in enumerate(own):  # one after the other, so that two copies of all are never held
                own[layer] = whole.index_select(0, rows)
        self.bias = self.bias.index_select(0, rows)


@torch.no_grad()
def decode(policy: CausalLM, active: _Active, table: Table, *, check_every: int) -> None:
    """Decode all rows of `active`, whose cache is a `StaticCache`, to their ends, into `table`.

    Each `check_every` steps it waits for the GPU and looks which rows are open, unless all end together.
    """
    assert isinstance(active.cache, StaticCache) and not policy.training
    device = active.rows.device.type
    # Autocast's own copies of weights must not be made during a capture: they would lie in the graph's memory.
    dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype=dtype, enabled=is_on, cache_enabled=False):
        steps = _Steps(policy, active, table, active.cache)
        for step in range(1, table.max_new):
            steps.take()
            if table.ends_early and step % check_every == 0:
                is_open = table.is_open(steps.rows, steps.done)
                num_open = int(is_open.sum())
                if num_open == 0:
                    break
                steps.leave_behind(is_open, num_open, num_left=table.max_new - step)
        else:
            steps.draw()
    if device == "cuda":
        torch.cuda.current_stream().synchronize()  # a graph must outlive its last replay


class _Steps:
    """One token after the other for the rows that are left; what changes stays where it is between two captures."""

    def __init__(self, policy: CausalLM, active: _Active, table: Table, cache: StaticCache) -> None:
        self.policy, self.table, self.cache = policy, table, cache
        self.rows, self.hidden = active.rows, active.hidden.clone()
        self.done, self.position = active.done.clone(), active.position.clone()
        self.head = _cast(policy.head_weight).to(_cast(self.hidden).dtype).t()
        # Autocast would cast these again in each replay; cast once, they give the same bits.
        self.weights = {
            f"{name}.{key}": _cast(weight)
            for name, module in policy.named_modules()
            if isinstance(module, nn.Linear)
            for key, weight in module.named_parameters(recurse=False)
        }
        self.pool = torch.cuda.graph_pool_handle() if self.rows.device.type == "cuda" else None
        self.repeat: Callable[[], None] = self._step

    def take(self) -> None:
        cache = self.cache
        if cache.used == cache.length:
            # Of n slots n / 2 are read in vain on average, for n steps: with the best n that costs what a capture does.
            num_left = cache.num_slots - cache.used
            best = math.sqrt(2 * CAPTURE_BYTES / cache.slot_bytes)
            num_parts = max(1, round(num_left / max(best, ALIGNMENT)))
            cache.length = min(_aligned(cache.used + math.ceil(num_left / num_parts)), cache.num_slots)
            self.repeat = self._captured()
        else:
            self.repeat()
        cache.used += 1

    def draw(self) -> Tensor:
        """Draw a token for each row, `[A]`."""
        logits = (self.hidden.to(self.head.dtype) @ self.head) / self.table.sampling.temperature
        token = self.table.draw(logits, self.rows, self.done)
        self.done += 1
        return token

    def leave_behind(self, is_open: Tensor, num_open: int, *, num_left: int) -> None:
        """Go on with the open rows, filled up to a power of two with some that ended, where that saves enough."""
        cache, size = self.cache, 1 << (num_open - 1).bit_length()
        saved = max(0.0, 1 - size / len(self.rows)) * cache.slot_bytes * cache.length * num_left
        if saved > CAPTURE_BYTES:
            kept = is_open.int().argsort(descending=True, stable=True)[:size]
            cache.keep(kept)
            self.rows, self.hidden = self.rows[kept], self.hidden[kept]
            self.done, self.position = self.done[kept], self.position[kept]
            cache.length = cache.used  # so that the next step is captured

    def _step(self) -> None:
        token = self.draw()
        # A finished row that is still in the cache goes on at its last position; what it draws is not kept.
        place = self.position.clamp(max=self.policy.context_length - 1)
        inputs = {"positions": place[:, None], "cache": self.cache}
        self.hidden.copy_(functional_call(self.policy, self.weights, (token[:, None],), inputs)[:, 0])
        self.position += 1

    def _captured(self) -> Callable[[], None]:
        """Take a step, and return what takes the next ones: a graph on a GPU, elsewhere the same function."""
        if self.pool is None:
            self._step()
            return self._step
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        # This step warms up: kernels are loaded and cuBLAS has its workspace on this stream before the capture. The
        # graph before this one is kept until then, so that its memory is taken over.
        side = capture.capture_stream
        assert side is not None
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        with capture:
            self._step()
        return graph.replay


def _cast(x: Tensor) -> Tensor:
    """Return `x` as autocast, where it is on, gives it to a matrix product; it leaves float64 as it is."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _aligned(num_slots: int) -> int:
    return math.ceil(num_slots / ALIGNMENT) * ALIGNMENT
