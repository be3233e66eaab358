"""Decoding on a GPU by CUDA graphs: a step is one launch, where Python would launch some three hundred kernels.

A graph repeats the same kernels on the same addresses. So keys and values lie in arrays of a fixed size, the number of
the slot that a step writes is on the device, and a mask hides the empty slots; each step opens one more. Attention
reads hidden slots too, so it is given only a few more than are filled, and rows that ended are dropped now and then.
Both need another capture, and are done where they save more time than a capture takes.

Graphs are captured anew for each rollout. They would stay valid, as optimizers update weights in place, but only with
their cache, and the update needs that memory: the cache is the largest thing there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlft.models.base import CausalLM
from rlft.models.kv.static import ALIGNMENT, StaticCache, aligned
from rlft.rollout.state import Prefilled, RolloutState

CAPTURE_BYTES = 80e9  # what a GPU reads in the time of a capture, 20 ms at 4 TB/s; benchmarks/gpu.py measures it


def fits(policy: CausalLM, device: torch.device) -> bool:
    """Return whether `decode` can be used: on a GPU, for a policy that leaves attention to its cache."""
    return device.type == "cuda" and policy.takes_packed


@torch.no_grad()
def decode(policy: CausalLM, new: Prefilled, state: RolloutState, *, check_every: int) -> None:
    """Decode all rows of `new` to their ends, into `state`.

    Unless all rows end together, every `check_every` steps it waits for the GPU to see which rows are open.
    """
    assert not policy.training
    device = new.rows.device.type
    cache = StaticCache(new.prefix, new.prompt_of_row, max_new_tokens=state.max_new, shape=policy.cache_shape)
    # Autocast must not make its copies of weights during a capture: they would lie in the graph's memory.
    dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype=dtype, enabled=is_on, cache_enabled=False):
        steps = _Steps(policy, new, state, cache)
        for step in range(1, state.max_new):
            steps.take()
            if state.ends_early and step % check_every == 0:
                is_open = state.is_open(steps.rows, steps.done)
                num_open = int(is_open.sum())
                if num_open == 0:
                    break
                steps.compact(is_open, num_open, num_left=state.max_new - step)
        else:
            steps.draw()
    if device == "cuda":
        torch.cuda.current_stream().synchronize()  # a graph must outlive its last replay


class _Steps:
    """Decoding step by step; between two captures all tensors that change stay at their addresses."""

    def __init__(self, policy: CausalLM, new: Prefilled, state: RolloutState, cache: StaticCache) -> None:
        self.policy, self.state, self.cache = policy, state, cache
        self.rows, self.hidden = new.rows, new.hidden.clone()
        self.done, self.position = torch.zeros_like(new.rows), new.position.clone()
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
        """Take one step: draw a token for each row and forward it."""
        cache = self.cache
        if cache.used == cache.length:
            # With n spare slots, n / 2 are read in vain on average, for n steps; at the best n that costs one capture.
            num_left = cache.num_slots - cache.used
            best = math.sqrt(2 * CAPTURE_BYTES / cache.slot_bytes)
            num_parts = max(1, round(num_left / max(best, ALIGNMENT)))
            cache.length = min(aligned(cache.used + math.ceil(num_left / num_parts)), cache.num_slots)
            self.repeat = self._captured()
        else:
            self.repeat()
        cache.used += 1

    def draw(self) -> Tensor:
        """Draw a token for each row, `[A]`."""
        token = self.state.draw(self.hidden.to(self.head.dtype) @ self.head, self.rows, self.done)
        self.done += 1
        return token

    def compact(self, is_open: Tensor, num_open: int, *, num_left: int) -> None:
        """Drop rows that ended, down to a power of two that holds the open ones, where that saves enough."""
        cache, size = self.cache, 1 << (num_open - 1).bit_length()
        saved = max(0.0, 1 - size / len(self.rows)) * cache.slot_bytes * cache.length * num_left
        if saved > CAPTURE_BYTES:
            kept = is_open.int().argsort(descending=True, stable=True)[:size]
            cache.compact(kept)
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
        """Take a step, and return the function that takes the next ones: a graph's replay on a GPU, else `_step`."""
        if self.pool is None:
            self._step()
            return self._step
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        # This step is a warm-up: before the capture, kernels are loaded and cuBLAS has its workspace on this stream.
        # The previous graph is kept until the new one exists, so that its memory is reused.
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
    """Return `x` in the dtype in which autocast, if it is on, gives it to a matrix product; float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
