"""The efficiency of a step: arithmetic, padding and memory. docs/metrics.md defines the metrics."""

from __future__ import annotations

import resource
import time
from functools import cache

import torch
from torch import nn

from rlft.core.batch import Batch, Rows, num_read
from rlft.models.base import CausalLM


def forward_flops(policy: CausalLM, rows: Rows) -> float:
    """Return the floating-point operations that one forward pass over the rows needs: each prompt once, no padding.

    They are 2 for each token and each weight of a matrix (Kaplan et al., arXiv:2001.08361, section 2.1), where the
    weights after the last attention count only for tokens from which a token is predicted; 2 V C for each predicted
    token; and 4 D for each query head and each pair of tokens of which one attends to the other.
    """
    prompts, completions = rows.prompt_lengths.double(), num_read(rows).double()
    read = float(prompts.sum() + completions.sum())
    of_prompts = prompts * (prompts + 1) / 2
    of_completions = completions * (rows.prompt_lengths[rows.prompt_of_row] + (completions + 1) / 2)
    pairs = float(of_prompts.sum() + of_completions.sum())
    shape = policy.cache_shape
    heads = shape.num_layers * policy.num_heads * shape.head_dim
    head = policy.head_weight.numel() * float(rows.completion_mask.sum())
    mask = rows.completion_mask
    predicting = int(mask[:, 1:].sum()) + len(rows.prompt_of_row[mask[:, 0]].unique())  # + the last tokens of prompts
    unread = read - predicting
    return 2 * _matrix_weights(policy) * read - 2 * policy.num_last_weights * unread + 2 * head + 4 * heads * pairs


def of_update(
    policy: CausalLM,
    batch: Batch,
    micro_batches: list[Batch],
    *,
    seconds: float,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Return the metrics of an update of these micro-batches that took `seconds`, with matrix products in `dtype`."""
    rows = [micro.rows for micro in micro_batches]
    needed = 3 * sum(forward_flops(policy, r) for r in rows)  # a backward pass costs two forward passes
    return {
        "efficiency/padding_fraction": padding_fraction(policy, rows),
        "efficiency/left_out_fraction": 1.0 - sum(micro.num_rows for micro in micro_batches) / batch.num_rows,
        "efficiency/update_mfu": needed / seconds / measured_ceiling(device, dtype),
    }


def padding_fraction(policy: CausalLM, batches: list[Rows]) -> float:
    """Return the fraction of the positions computed by the policy's layers that are padding."""
    if policy.takes_packed:
        return 0.0
    tokens = sum(int(rows.prompt_lengths.sum() + num_read(rows).sum()) for rows in batches)
    places = sum(rows.prompt_ids.numel() + rows.completion_ids[:, 1:].numel() for rows in batches)
    return 1.0 - tokens / places if places else 0.0


@cache
def measured_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large square matrix product: measured now, best of five."""
    size = 1024 if device.type == "cpu" else 8192
    draws = torch.Generator(device).manual_seed(0)  # on a GPU, ones take less power, and so less time
    a, b = (torch.empty(size, size, dtype=dtype, device=device).uniform_(-1, 1, generator=draws) for _ in range(2))
    seconds = []
    for _ in range(6):  # the first one warms up
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far, in GiB: allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _matrix_weights(policy: CausalLM) -> int:
    """Return the number of weights that a token is multiplied with: all matrices but embeddings and the head."""
    looked_up = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
    looked_up.add(id(policy.head_weight))
    return sum(p.numel() for p in policy.parameters() if p.dim() >= 2 and id(p) not in looked_up)
