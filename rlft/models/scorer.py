"""The policy with its log-probability head, as one module: a micro-batch is one forward, whatever it needs inside.

DDP and FSDP hook a module's forward. Wrapping policy and head together lets them see a single call, although a prompt
and its completions are two passes through the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlft.errors import ConfigError
from rlft.functional.logprobs import token_logprobs
from rlft.models.base import CausalLM
from rlft.rollout.cache import PrefixCache


@dataclass(frozen=True)
class Rows:
    """B completions of P prompts, both right-padded; several rows may share a prompt."""

    prompt_ids: Tensor  # [P, S] int64
    prompt_lengths: Tensor  # [P] int64, at least 1
    prompt_of_row: Tensor  # [B] int64
    completion_ids: Tensor  # [B, T] int64
    completion_mask: Tensor  # [B, T] bool, True where a token counts (the end token does, what follows does not)

    def to(self, device: torch.device) -> Rows:
        return Rows(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Scores:
    """Per-token results for the completion tokens; 0 outside the mask."""

    logprobs: Tensor  # [B, T] log pi(token | what is before it), at the given temperature
    entropy: Tensor  # [B, T] nats, of the whole next-token distribution
    hidden: Tensor  # [N, C] the hidden states that predict the N counted tokens, row by row
    values: Tensor | None = None  # [B, T] of the head, where there is one; [B, T, K] of one with K outputs


class Scorer(nn.Module):
    """Scores completions: each prompt is forwarded once, and its completions attend to its keys and values.

    `head` maps (hidden [N, C], rows) to a number for each counted token [N] (`rlft/models/heads.py`).
    """

    def __init__(self, policy: CausalLM, head: nn.Module | None = None) -> None:
        super().__init__()
        self.policy, self.head = policy, head

    def forward(
        self,
        rows: Rows,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        noised_ids: Tensor | None = None,
    ) -> Scores:
        """Score the counted tokens; `noised_ids` [B, T] are the completions as a bidirectional policy reads them."""
        mask = rows.completion_mask
        states = predictors(self.policy, rows) if noised_ids is None else denoisers(self.policy, rows, noised_ids)
        hidden = states[mask]  # [N, C]
        logprobs, entropy = token_logprobs(
            hidden, self.policy.head_weight, rows.completion_ids[mask], temperature=temperature,
            entropy_grad=entropy_grad,
        )  # fmt: skip
        values = None if self.head is None else scatter(self.head(hidden, rows), mask)
        return Scores(scatter(logprobs, mask), scatter(entropy, mask), hidden, values)


def predictors(policy: CausalLM, rows: Rows) -> Tensor:
    """Return `[B, T, C]`: the hidden state that predicts each completion token."""
    if policy.mask_id is not None:
        raise ConfigError(
            "a bidirectional model has no next-token probabilities: train it with algo=denoise, or set "
            "model.is_causal=true"
        )
    num_slots, num_new = rows.prompt_ids.shape[1], rows.completion_ids.shape[1] - 1
    if num_slots == 1 and len(rows.prompt_ids) == len(rows.completion_ids):
        # One token of context for each row, none shared (plain text): a single causal pass over the whole row.
        first = rows.prompt_ids[rows.prompt_of_row]
        return policy(torch.cat([first, rows.completion_ids[:, :-1]], dim=1))
    prefix = PrefixCache(rows.prompt_lengths)
    hidden = policy(rows.prompt_ids, cache=prefix)
    last = hidden[torch.arange(len(hidden), device=hidden.device), rows.prompt_lengths - 1]  # [P, C]
    first = last.index_select(0, rows.prompt_of_row)[:, None]
    if num_new == 0:
        return first
    positions = rows.prompt_lengths[rows.prompt_of_row, None] + torch.arange(num_new, device=hidden.device)
    # Padding after a completion's end would run past the last position; what it computes is never read.
    positions = positions.clamp(max=policy.context_length - 1)
    expanded = prefix.expand(rows.prompt_of_row)
    return torch.cat([first, policy(rows.completion_ids[:, :-1], positions=positions, cache=expanded)], dim=1)


def denoisers(policy: CausalLM, rows: Rows, noised_ids: Tensor) -> Tensor:
    """Return `[B, T, C]`: a bidirectional policy's hidden state at each completion token's own place.

    `noised_ids` `[B, T]` are the completions with `policy.mask_id` where a token is hidden. Nothing hides padding: all
    prompts must be of one length, and all completions.
    """
    prompts = rows.prompt_ids[rows.prompt_of_row]
    return policy(torch.cat([prompts, noised_ids], dim=1))[:, prompts.shape[1] :]


def scatter(x: Tensor, mask: Tensor) -> Tensor:
    """Put the N entries of `x` `[N]` (or `[N, K]`) where `mask` `[B, T]` is true, 0 elsewhere."""
    wide = mask.view(*mask.shape, *(1,) * (x.dim() - 1))
    return x.new_zeros(*mask.shape, *x.shape[1:]).masked_scatter(wide, x)
