"""What rollouts are scored by: rewards as text sees them, frozen models' logprobs, and the metrics of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlft.core.batch import Batch
from rlft.core.metrics import Means
from rlft.data.prompts import Prompt
from rlft.functional.advantages import centre_groups
from rlft.functional.kl import exact
from rlft.functional.logprobs import CHUNK_BYTES, exact_kl
from rlft.models.base import CausalLM
from rlft.models.heads import Critic, Head
from rlft.models.scorer import Scorer, scatter
from rlft.rewards.compose import RewardOutput, RewardSum
from rlft.rollout.engine import Rollout
from rlft.text.tokenizer import Tokenizer


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
        messages=[p.messages for p in prompts],
    )


def add_rewards(means: Means, scored: RewardOutput, *, prefix: str = "") -> None:
    """Add the mean reward and each component's, over the completions that it counts."""
    means.add(f"{prefix}reward", scored.total, ~scored.total.isnan())
    for name, values in scored.components.items():
        means.add(f"{prefix}rewards/{name}/mean", values, ~values.isnan())


def add_rollout(means: Means, scored: RewardOutput, rollout: Rollout, *, group_size: int) -> None:
    """Add rewards, their spread within groups, lengths and finish reasons."""
    add_rewards(means, scored)
    if group_size > 1:
        std = group_std(scored.total, group_size=group_size)
        means.add("reward_std", std)
        means.add("frac_reward_zero_std", std == 0)
    lengths = rollout.rows.completion_mask.sum(dim=1)
    means.add("completions/mean_length", lengths)
    means.add_max("completions/max_length", lengths)
    means.add("completions/clipped_ratio", torch.tensor([r == "length" for r in rollout.finish_reasons]))


def group_std(rewards: Tensor, *, group_size: int) -> Tensor:
    """Return each group's standard deviation (ddof 1), [P], of rewards [B] without those that are nan."""
    centred, num = centre_groups(rewards, group_size)  # exactly 0 throughout a group of equal rewards
    return (centred.square().sum(dim=1) / (num[:, 0] - 1).clamp(min=1)).sqrt()


def sample_rows(
    tokenizer: Tokenizer, prompts: list[Prompt], rollout: Rollout, scored: RewardOutput, *, count: int | None = None
) -> list[dict]:
    """Return a row of samples.jsonl for each of the first `count` completions; `prompts` has an entry for each row."""
    texts = tokenizer.decode_batch(rollout.completions()[:count])
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


class FrozenScores(NamedTuple):
    """A frozen model's view of a batch; 0 outside the mask."""

    logprobs: Tensor  # [B, T]
    hidden: Tensor  # [B, T, C]
    values: Tensor | None  # [B, T] of the head, where one was given


@torch.no_grad()
def frozen_scores(
    model: CausalLM,
    batch: Batch,
    *,
    temperature: float,
    max_rows: int | None,
    max_tokens: int | None,
    head: Head | None = None,
) -> FrozenScores:
    """Score a batch without a gradient, by micro-batches, with the model in evaluation mode."""
    mask = batch.rows.completion_mask
    modes = [(module, module.training) for module in (model, head) if module is not None]
    scorer = Scorer(model, head).eval()
    logprobs, hidden, values = [], [], []
    for micro in batch.micro_batches(max_rows=max_rows, max_tokens=max_tokens):
        scores = scorer(micro.rows, temperature=temperature)
        counted = micro.rows.completion_mask
        logprobs.append(scores.logprobs[counted])
        hidden.append(scores.hidden)
        if scores.values is not None:
            values.append(scores.values[counted])
    for module, was_training in modes:
        module.train(was_training)
    flat = torch.cat(hidden)
    states = flat.new_zeros(*mask.shape, flat.shape[-1])
    states[mask] = flat
    return FrozenScores(
        scatter(torch.cat(logprobs), mask), states, scatter(torch.cat(values), mask) if values else None
    )


@torch.no_grad()
def critic_values(critic: Critic, batch: Batch, *, max_rows: int | None, max_tokens: int | None) -> Tensor:
    """Return a critic's values [B, T] without a gradient; the policy, which it does not read, is not run."""
    was_training = critic.training
    critic.eval()
    micro_batches = batch.micro_batches(max_rows=max_rows, max_tokens=max_tokens)
    values = torch.cat([critic(None, micro.rows) for micro in micro_batches])
    critic.train(was_training)
    return scatter(values, batch.rows.completion_mask)


def exact_token_kl(
    policy: CausalLM,
    reference: CausalLM,
    hidden: Tensor,
    ref_hidden: Tensor,
    *,
    temperature: float,
    needs_grad: bool = False,
) -> Tensor:
    """Return KL(policy || reference) of the next token at each of N positions, [N], from hidden states [N, C].

    With `needs_grad` it is differentiable in the policy; chunks of logits are computed again in the backward pass.
    """
    weight, ref_weight = policy.head_weight, reference.head_weight
    if not needs_grad:
        return exact_kl(hidden.detach(), ref_hidden, weight, ref_weight, temperature=temperature)

    def chunk(hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> Tensor:
        return exact(hidden @ weight.t() / temperature, ref_hidden @ ref_weight.t() / temperature)

    size = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    pairs = zip(hidden.split(size), ref_hidden.split(size), strict=True)
    chunks: list[Any] = [checkpoint(chunk, h, ref, weight, use_reentrant=False) for h, ref in pairs]
    return torch.cat(chunks) if chunks else hidden.new_zeros(0)
