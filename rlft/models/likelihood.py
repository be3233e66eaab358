"""The likelihood of given text: blocks as rows to score, and the mean loss per token over many of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rlft.core.batch import Batch, Rows
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer

EVAL_ROWS = 32  # rows in one forward of an evaluation


def text_rows(blocks: Tensor) -> Rows:
    """Return blocks `[B, T + 1]` as B one-token prompts with T counted tokens each."""
    num_rows = torch.arange(len(blocks), device=blocks.device)
    targets = blocks[:, 1:]
    return Rows(blocks[:, :1], torch.ones_like(num_rows), num_rows, targets, torch.ones_like(targets, dtype=torch.bool))


@torch.no_grad()
def mean_loss(model: CausalLM, pieces: Iterable[Rows]) -> float:
    """Return the mean negative log-likelihood of the counted tokens of all pieces, in nats per token."""
    scorer, total, count = Scorer(model), 0.0, 0
    for rows in pieces:
        total -= float(scorer(rows).logprobs.double().sum())  # 0 where nothing counts
        count += int(rows.completion_mask.sum())
    return total / count


def perplexity(loss: float) -> float:
    """Return exp(loss), inf where that overflows, as a diverged model's does."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def summed_logprobs(
    model: CausalLM, batch: Batch, *, limits: dict[str, int | None], temperature: float = 1.0
) -> Tensor:
    """Return log pi(completion | prompt) of each row [B], with the model in evaluation mode."""
    was_training = model.training
    scorer = Scorer(model).eval()
    micros = batch.micro_batches(**limits)
    sums = [scorer(micro.rows, temperature=temperature).logprobs.sum(dim=1) for micro in micros]
    model.train(was_training)
    return torch.cat(sums)
