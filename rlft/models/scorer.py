"""The policy with its log-probability head as one module, so that a micro-batch is one forward.

DDP and FSDP hook a module's forward. They see a single call, although prompts and completions may be two forwards of
the policy inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlft.core.batch import Rows
from rlft.functional.logprobs import token_logprobs
from rlft.models.base import CausalLM
from rlft.models.rows import predictors


@dataclass(frozen=True)
class Scores:
    """Results for each completion token; 0 outside the mask."""

    logprobs: Tensor  # [B, T] log pi(token | tokens before it), at the given temperature
    entropy: Tensor  # [B, T] nats, of the whole next-token distribution
    hidden: Tensor  # [N, C] the hidden states that predict the N counted tokens, row by row
    values: Tensor | None = None  # [B, T] of the head, if there is one; [B, T, K] if it has K outputs


class Scorer(nn.Module):
    """Scores completions: each prompt is forwarded once, and its completions attend to its keys and values.

    `head` maps (hidden [N, C], rows) to a number for each counted token [N] (`rlft/models/heads.py`).
    """

    def __init__(self, policy: CausalLM, head: nn.Module | None = None) -> None:
        super().__init__()
        self.policy, self.head = policy, head

    def forward(
        self, rows: Rows, *, temperature: float = 1.0, entropy_grad: bool = False, noised_ids: Tensor | None = None
    ) -> Scores:
        """Score the counted tokens; `noised_ids` [B, T] are the completions as a bidirectional policy reads them."""
        mask = rows.completion_mask
        hidden = predictors(self.policy, rows) if noised_ids is None else denoisers(self.policy, rows, noised_ids)
        weight, targets = self.policy.head_weight, rows.completion_ids[mask]
        logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=temperature, entropy_grad=entropy_grad)
        values = None if self.head is None else scatter(self.head(hidden, rows), mask)
        return Scores(scatter(logprobs, mask), scatter(entropy, mask), hidden, values)


def denoisers(policy: CausalLM, rows: Rows, noised_ids: Tensor) -> Tensor:
    """Return `[N, C]`: a bidirectional policy's hidden states at the places of the N counted completion tokens.

    `noised_ids` `[B, T]` are the completions with `policy.mask_id` where a token is hidden. Padding is not masked, so
    all prompts must have one length, and all completions another.
    """
    prompts = rows.prompt_ids[rows.prompt_of_row]
    return policy(torch.cat([prompts, noised_ids], dim=1))[:, prompts.shape[1] :][rows.completion_mask]


def scatter(x: Tensor, mask: Tensor) -> Tensor:
    """Put the N entries of `x` `[N]` (or `[N, K]`) where `mask` `[B, T]` is true, 0 elsewhere."""
    wide = mask.view(*mask.shape, *(1,) * (x.dim() - 1))
    return x.new_zeros(*mask.shape, *x.shape[1:]).masked_scatter(wide, x)
