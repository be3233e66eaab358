"""What a step cost beside what it had to: arithmetic, padding, memory. Definitions: docs/metrics.md."""

from __future__ import annotations

import resource
import time
from functools import cache

import torch
from torch import nn

from rlft.core.batch import Batch, Rows, num_read
from rlft.models.base import CausalLM


def forward_flops(policy: CausalLM, rows: Rows) -> float:
    """Return the floating-point operations that one forward over the rows needs: each prompt once, no padding.

    2 for each weight of a matrix and token read (Kaplan et al., arXiv:2001.08361, section 2.1), but behind the last
    attention for tokens that something is predicted from, 2 V C for each token predicted, and 4 D for each query head
    and pair of tokens that attend.
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
    predicting = int(mask[:, 1:].sum()) + len(rows.prompt_of_row[mask[:, 0]].unique())  # a prompt's last token is one
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
    """Return the metrics of an update that ran these micro-batches in so many seconds; products were in `dtype`."""
    rows = [micro.rows for micro in micro_batches]
    needed = 3 * sum(forward_flops(policy, r) for r in rows)  # a backward is two forwards
    return {
        "efficiency/padding_fraction": padding_fraction(policy, rows),
        "efficiency/left_out_fraction": 1.0 - sum(micro.num_rows for micro in micro_batches) / batch.num_rows,
        "efficiency/update_mfu": needed / seconds / measured_ceiling(device, dtype),
    }


def padding_fraction(policy: CausalLM, batches: list[Rows]) -> float:
    """Return the share of the places that the policy's layers compute in which no token stands."""
    if policy.takes_packed:
        return 0.0
    tokens = sum(int(rows.prompt_lengths.sum() + num_read(rows).sum()) for rows in batches)
    places = sum(rows.prompt_ids.numel() + rows.completion_ids[:, 1:].numel() for rows in batches)
    return 1.0 - tokens / places if places else 0.0


@cache
def measured_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large square matrix product here and now: the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    draws = torch.Generator(device).manual_seed(0)  # ones would take less power, and so less time, on a GPU
    a, b = (torch.empty(size, size, dtype=dtype, device=device).uniform_(-1, 1, generator=draws) for _ in range(2))
    seconds = []
    for _ in range(6):  # the first warms up
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory so far, in GiB: allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _matrix_weights(policy: CausalLM) -> int:
    """Return how many weights a token is multiplied with, the head left out: matrices that are no embeddings."""
    looked_up = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
    looked_up.add(id(policy.head_weight))
    return sum(p.numel() for p in policy.parameters() if p.dim() >= 2 and id(p) not in looked_up)
