"""The frozen side of an online batch: sampler's and reference's logprobs, and the KL between policy and reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlft.algos.online.kl import KLPenalty
from rlft.algos.online.scoring import critic_values, exact_token_kl, frozen_scores
from rlft.core.batch import Batch, Rows, pad
from rlft.core.metrics import Means
from rlft.functional.logprobs import token_logprobs
from rlft.models.base import CausalLM
from rlft.models.heads import Critic, Head
from rlft.models.scorer import Scores, scatter
from rlft.rollout.engine import Rollout
from rlft.rollout.sampling import Sampling

EXACT_KL_VOCABULARY = 16_384  # up to here the exact KL is logged beside its estimate: one more head product a token


class FrozenSide:
    """Scores a rollout by the policy that sampled it and by the reference, where there is one.

    Arguments: `limits` are the max_rows and max_tokens of one forward; `head` is the critic.
    """

    def __init__(
        self,
        *,
        policy: CausalLM,
        reference: CausalLM | None,
        kl: KLPenalty,
        head: Head | None,
        sampling: Sampling,
        autocast: Callable[[], AbstractContextManager],
        limits: dict[str, Any],
    ) -> None:
        self.policy, self.reference, self.kl, self.head = policy, reference, kl, head
        self.sampling, self.autocast, self.limits = sampling, autocast, limits
        is_small = policy.vocab_size <= EXACT_KL_VOCABULARY
        self.has_exact = reference is not None and (is_small or kl.is_exact)

    def values(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return old_logprobs [B, T] and, where there is what they need, old_values and ref_logprobs [B, T], and
        ref_hidden [B, T, C]."""
        values, batch, temperature = {"old_logprobs": rollout.logprobs}, Batch(rollout.rows), self.sampling.temperature
        with self.autocast():
            if isinstance(self.head, Critic) and self.sampling.is_plain:
                values["old_values"] = critic_values(self.head, batch, **self.limits)
            elif self.head is not None or not self.sampling.is_plain:
                own = frozen_scores(self.policy, batch, temperature=temperature, head=self.head, **self.limits)
                values |= {} if self.sampling.is_plain else {"old_logprobs": own.logprobs}
                values |= {} if own.values is None else {"old_values": own.values}
            if self.reference is not None:
                frozen = frozen_scores(self.reference, batch, temperature=temperature, **self.limits)
                values["ref_logprobs"] = frozen.logprobs
                values |= {"ref_hidden": frozen.hidden} if self.has_exact else {}
        return values

    @torch.no_grad()
    def sampled_kl(self, rows: Rows, values: dict[str, Tensor]) -> Tensor:
        """Return the estimator at the sampled tokens [B, T], 0 outside the mask, for a penalty in the reward."""
        mask, temperature = rows.completion_mask, self.sampling.temperature
        if not self.kl.is_exact:
            return torch.where(mask, self.kl(values["old_logprobs"], values["ref_logprobs"]), 0.0)
        assert self.reference is not None
        with self.autocast():
            own = frozen_scores(self.policy, Batch(rows), temperature=temperature, **self.limits)
        ref_hidden = values["ref_hidden"][mask]
        exact = exact_token_kl(self.policy, self.reference, own.hidden[mask], ref_hidden, temperature=temperature)
        return torch.zeros_like(own.logprobs).masked_scatter(mask, exact)

    @torch.no_grad()
    def target_logprobs(self, rows: Rows, targets: list[list[int]]) -> Tensor:
        """Return the policy's logprob of other tokens than the sampled ones, at their places; [B, T], 0 beyond them."""
        mask = rows.completion_mask
        ids, has_target = pad([row[: mask.shape[1]] for row in targets], device=mask.device)
        width = mask.shape[1] - ids.shape[1]
        ids, has_target = (torch.nn.functional.pad(x, (0, width)) for x in (ids, has_target))
        with self.autocast():
            own = frozen_scores(self.policy, Batch(rows), temperature=self.sampling.temperature, **self.limits)
            logprobs, _ = token_logprobs(
                own.hidden[mask], self.policy.head_weight, ids[mask], temperature=self.sampling.temperature
            )
        return torch.where(has_target & mask, scatter(logprobs, mask), 0.0)

    def token_kl(self, scores: Scores, values: dict[str, Tensor], mask: Tensor, means: Means) -> Tensor:
        """Return the estimator at each token [B, T], with a gradient where it is trained; log it and the exact KL."""
        assert self.reference is not None
        kl = None if self.kl.is_exact else self.kl(scores.logprobs, values["ref_logprobs"])
        if self.has_exact:
            exact = exact_token_kl(
                self.policy, self.reference, scores.hidden, values["ref_hidden"][mask],
                temperature=self.sampling.temperature, needs_grad=self.kl.is_exact and self.kl.is_in_loss,
            )  # fmt: skip
            means.add("kl_exact", exact)
            kl = torch.zeros_like(scores.logprobs).masked_scatter(mask, exact) if kl is None else kl
        assert kl is not None
        means.add("kl", kl, mask)
        return kl
