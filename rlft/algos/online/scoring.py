"""Scores of a rollout by models that are not trained on it: the sampler, the reference, the critic; and their KL."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlft.algos.base import Run
from rlft.algos.online.kl import KLPenalty
from rlft.core.batch import Batch, Rows, pad
from rlft.core.errors import NonFiniteError
from rlft.core.metrics import Metrics
from rlft.functional.kl import exact
from rlft.functional.logprobs import CHUNK_BYTES, exact_kl, token_logprobs
from rlft.models.base import CausalLM
from rlft.models.heads import Critic, Head
from rlft.models.scorer import Scorer, Scores, scatter
from rlft.rollout.engine import Rollout
from rlft.rollout.sampling import Sampling

EXACT_KL_VOCABULARY = 16_384  # up to here the exact KL is logged beside its estimate: one more head product a token
MAX_LOGPROB_DIFFERENCE = 1e-3  # between sampler and trainer in float32, nats


class ReferenceScores:
    """Scores of a rollout by the policy that sampled it and by the frozen reference, and the KL between the two."""

    def __init__(self, run: Run, *, kl: KLPenalty, head: Head | None, sampling: Sampling) -> None:
        """`head` is the critic, where there is one; `sampling` is how the rollout is drawn."""
        self.run, self.kl, self.head, self.sampling = run, kl, head, sampling
        self.has_exact = is_exact_kl_logged(run) or (run.reference is not None and kl.is_exact)

    def values(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return the batch's frozen tensors: old_logprobs [B, T], and those of a critic and a reference, if any.

        old_values [B, T] are the critic's, ref_logprobs [B, T] and ref_hidden [B, T, C] the reference's.
        """
        values, rows, is_plain = {"old_logprobs": rollout.logprobs}, rollout.rows, self.sampling.is_plain
        if isinstance(self.head, Critic) and is_plain:
            with self.run.autocast():
                values["old_values"] = critic_values(self.head, Batch(rows), **self.run.settings.limits)
        elif self.head is not None or not is_plain:
            own = self._scores(self.run.policy, rows, head=self.head)
            values |= {} if is_plain else {"old_logprobs": own.logprobs}
            values |= {} if own.values is None else {"old_values": own.values}
        if self.run.reference is not None:
            frozen = self._scores(self.run.reference, rows)
            values["ref_logprobs"] = frozen.logprobs
            values |= {"ref_hidden": frozen.hidden} if self.has_exact else {}
        return values

    @torch.no_grad()
    def sampled_kl(self, rows: Rows, values: dict[str, Tensor]) -> Tensor:
        """Return the estimator at the sampled tokens [B, T], 0 outside the mask, for a penalty in the reward."""
        mask = rows.completion_mask
        if not self.kl.is_exact:
            return torch.where(mask, self.kl(values["old_logprobs"], values["ref_logprobs"]), 0.0)
        own = self._scores(self.run.policy, rows)
        exact = self._exact_kl(own.hidden[mask], values["ref_hidden"][mask])
        return torch.zeros_like(own.logprobs).masked_scatter(mask, exact)

    @torch.no_grad()
    def target_logprobs(self, rows: Rows, targets: list[list[int]]) -> Tensor:
        """Return the policy's logprobs of given tokens in place of the sampled ones, [B, T]; 0 beyond their end."""
        mask = rows.completion_mask
        ids, has_target = pad([row[: mask.shape[1]] for row in targets], device=mask.device)
        width = mask.shape[1] - ids.shape[1]
        ids, has_target = (F.pad(x, (0, width)) for x in (ids, has_target))
        hidden = self._scores(self.run.policy, rows).hidden[mask]
        with self.run.autocast():
            weight, temperature = self.run.policy.head_weight, self.sampling.temperature
            logprobs, _ = token_logprobs(hidden, weight, ids[mask], temperature=temperature)
        return torch.where(has_target & mask, scatter(logprobs, mask), 0.0)

    def token_kl(self, scores: Scores, values: dict[str, Tensor], mask: Tensor, metrics: Metrics) -> Tensor:
        """Return the estimator at each token [B, T], with a gradient where it is trained; log it and the exact KL."""
        kl = None if self.kl.is_exact else self.kl(scores.logprobs, values["ref_logprobs"])
        if self.has_exact:
            needs_grad = self.kl.is_exact and self.kl.is_in_loss
            exact = self._exact_kl(scores.hidden, values["ref_hidden"][mask], needs_grad=needs_grad)
            metrics.add("kl_exact", exact)
            kl = torch.zeros_like(scores.logprobs).masked_scatter(mask, exact) if kl is None else kl
        assert kl is not None
        metrics.add("kl", kl, mask)
        return kl

    def _scores(self, model: CausalLM, rows: Rows, *, head: Head | None = None) -> FrozenScores:
        return scored_by(model, rows, self.run, temperature=self.sampling.temperature, head=head)

    def _exact_kl(self, hidden: Tensor, ref_hidden: Tensor, *, needs_grad: bool = False) -> Tensor:
        assert self.run.reference is not None
        temperature, models = self.sampling.temperature, (self.run.policy, self.run.reference)
        return exact_token_kl(*models, hidden, ref_hidden, temperature=temperature, needs_grad=needs_grad)


def is_exact_kl_logged(run: Run) -> bool:
    """Return whether there is a reference, and a vocabulary small enough to log the exact KL beside its estimate."""
    return run.reference is not None and run.policy.vocab_size <= EXACT_KL_VOCABULARY


def check_sampler(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, metrics: Metrics, *, is_float32: bool) -> None:
    """Log the largest difference between the trainer's and the sampler's logprobs [B, T] at the first update.

    Raises `NonFiniteError` where it is above `MAX_LOGPROB_DIFFERENCE` in float32.
    """
    difference = (logprobs.detach() - old_logprobs).abs()
    metrics.add_max("sampling/sampling_logp_difference/max", difference, mask)
    largest = float(torch.where(mask, difference, 0.0).max())
    if is_float32 and largest > MAX_LOGPROB_DIFFERENCE:
        raise NonFiniteError(
            f"the sampler's logprobs differ from the trainer's by up to {largest:.1e} nats (allowed in float32: "
            f"{MAX_LOGPROB_DIFFERENCE:g}): the policy that sampled is not the one that is trained"
        )


class FrozenScores(NamedTuple):
    """A frozen model's view of a batch; 0 outside the mask."""

    logprobs: Tensor  # [B, T]
    hidden: Tensor  # [B, T, C]
    values: Tensor | None  # [B, T] of the head, where one was given


def scored_by(model: CausalLM, rows: Rows, run: Run, *, temperature: float, head: Head | None = None) -> FrozenScores:
    """Score rows as `frozen_scores` does, at the run's precision and micro-batches."""
    with run.autocast():
        return frozen_scores(model, Batch(rows), temperature=temperature, head=head, **run.settings.limits)


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
    values_of_tokens = scatter(torch.cat(values), mask) if values else None
    return FrozenScores(scatter(torch.cat(logprobs), mask), states, values_of_tokens)


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
