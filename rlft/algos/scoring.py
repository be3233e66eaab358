"""What rollouts are scored by: rewards as text sees them, and frozen models' logprobs."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.data.prompts import Prompt
from rlft.functional.logprobs import exact_kl
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer
from rlft.rewards.compose import RewardOutput, RewardSum
from rlft.rollout.engine import Rollout
from rlft.text.tokenizer import Tokenizer
from rlft.trainer.batch import Batch
from rlft.trainer.metrics import Means


def score(rewards: RewardSum, tokenizer: Tokenizer, prompts: list[Prompt], rollout: Rollout) -> RewardOutput:
    """Call the rewards on every completion; `prompts` has one entry for each row, [B]."""
    ids = rollout.completions()
    names = dict.fromkeys(name for p in prompts for name in p.columns)
    columns = {name: [p.columns.get(name) for p in prompts] for name in names}
    return rewards(
        prompts=[p.text for p in prompts],
        completions=tokenizer.decode_batch(ids),
        completion_ids=ids,
        columns=columns,
    )


def add_rewards(means: Means, scored: RewardOutput, *, prefix: str = "") -> None:
    """Add the mean reward and each component's, over the completions that it counts."""
    means.add(f"{prefix}reward", scored.total, ~scored.total.isnan())
    for name, values in scored.components.items():
        means.add(f"{prefix}rewards/{name}/mean", values, ~values.isnan())


def sample_rows(tokenizer: Tokenizer, prompts: list[Prompt], rollout: Rollout, scored: RewardOutput) -> list[dict]:
    """Return a row of samples.jsonl for each completion; `prompts` has one entry for each row."""
    texts = tokenizer.decode_batch(rollout.completions())
    return [
        {
            "prompt": prompts[i].text,
            "completion": text,
            "reward": float(scored.total[i]),
            "rewards": {name: float(values[i]) for name, values in scored.components.items()},
            "finish_reason": rollout.finish_reasons[i],
        }
        for i, text in enumerate(texts)
    ]


@torch.no_grad()
def frozen_scores(
    model: CausalLM, batch: Batch, *, temperature: float, max_rows: int | None, max_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Return logprobs [B, T] and hidden states [B, T, C] (0 outside the mask) without a gradient, by micro-batches."""
    mask = batch.rows.completion_mask
    was_training = model.training
    scorer = Scorer(model).eval()
    logprobs, hidden = [], []
    for micro in batch.micro_batches(max_rows=max_rows, max_tokens=max_tokens):
        scores = scorer(micro.rows, temperature=temperature)
        logprobs.append(scores.logprobs[micro.rows.completion_mask])
        hidden.append(scores.hidden)
    model.train(was_training)
    flat = torch.cat(hidden)
    states = flat.new_zeros(*mask.shape, flat.shape[-1])
    states[mask] = flat
    scattered = torch.cat(logprobs)
    return scattered.new_zeros(mask.shape).masked_scatter(mask, scattered), states


def exact_token_kl(
    policy: CausalLM, reference: CausalLM, hidden: Tensor, ref_hidden: Tensor, *, temperature: float
) -> Tensor:
    """Return KL(policy || reference) of the next token at each of N positions, [N], from hidden states [N, C]."""
    return exact_kl(
        hidden.detach(), ref_hidden, policy.head_weight, reference.head_weight, temperature=temperature
    )  # fmt: skip
