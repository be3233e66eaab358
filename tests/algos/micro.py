"""The micro task: two prompts of unequal length, three completions each, and a policy that is easy to enumerate."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.core.batch import Denominators
from rlft.core.metrics import Metrics
from rlft.models.scorer import Scorer
from tests.builders import Float64Rewards, policy_gradient, reward_sum, tiny

NAMES = ["grpo", "dr_grpo", "rloo", "reinforce"]
KL = ("algo.kl.coef=0.5",)  # large enough to be seen
WITHOUT_KL = ("dr_grpo", "reinforce", "dapo")
MAX_NEW = 5


def eighths(completion_ids, **_):
    """Rewards that differ within a group and that float32 holds exactly."""
    return [(sum((t + 1) * (i + 3) for t, i in enumerate(ids)) % 17) / 8 for ids in completion_ids]


def build(name: str, *overrides: str, **arguments):
    """A composition over two different uneven models in float64."""
    defaults = {
        "policy": tiny(9, spread=0.25).double(), "reference": tiny(2, spread=0.25).double(), "temperature": 0.8,
        "rewards": reward_sum(eighths, cls=Float64Rewards), "max_new_tokens": MAX_NEW,
    }  # fmt: skip
    return policy_gradient(name, *(() if name in WITHOUT_KL else KL), *overrides, **(defaults | arguments))


def loss_of(algorithm, batch, *, update: int, metrics: Metrics | None = None) -> Tensor:
    totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    return algorithm.loss(Scorer(algorithm.run.policy), batch, totals, metrics or Metrics(), update=update)


def gradient(loss: Tensor, policy) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def distributions(model, batch, row: int, temperature: float) -> tuple[Tensor, list[int]]:
    """Log-probabilities [T, V] at a row's counted tokens from one plain forward over [prompt | completion]."""
    rows = batch.rows
    p = int(rows.prompt_of_row[row])
    prompt = rows.prompt_ids[p, : int(rows.prompt_lengths[p])].tolist()
    completion = rows.completion_ids[row][rows.completion_mask[row]].tolist()
    hidden = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
    return torch.log_softmax(hidden @ model.head_weight.t() / temperature, dim=-1), completion


@torch.no_grad()
def frozen_distributions(model, batch, row: int, temperature: float) -> tuple[Tensor, list[int]]:
    return distributions(model, batch, row, temperature)


def completions(batch) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch.rows.completion_ids, batch.rows.completion_mask, strict=True)]
