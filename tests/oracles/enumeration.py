"""A softmax policy small enough to list every sequence that it can write, with exact probabilities."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def num_contexts(vocab_size: int, length: int) -> int:
    """How many prefixes a table of logits must hold: 1 + V + ... + V^(length - 1)."""
    return sum(vocab_size**t for t in range(length))


def sequences(vocab_size: int, length: int) -> Tensor:
    """Every sequence, [V^length, length] int64."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


def token_logprobs(table: Tensor, ids: Tensor) -> Tensor:
    """Logprobs [S, length] of sequences under `table` [contexts, V], logits for each prefix."""
    vocab_size, length = table.shape[1], ids.shape[1]
    logp = torch.log_softmax(table, -1)
    columns, prefix, offset = [], torch.zeros(ids.shape[0], dtype=torch.int64), 0
    for t in range(length):
        columns.append(logp[offset + prefix, ids[:, t]])
        prefix = prefix * vocab_size + ids[:, t]
        offset += vocab_size**t
    return torch.stack(columns, 1)
