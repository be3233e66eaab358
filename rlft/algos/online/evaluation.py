"""The evaluation of a sampling policy on held-out prompts: rewards, KL, diversity and fluency.

The prompts and the uniforms that draw the completions are the same at every evaluation of every run, so that two
evaluations differ by the policy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from rlft.algos.base import NOT_EVALUATED, Evaluation
from rlft.algos.online.scoring import add_rewards, exact_token_kl, frozen_scores, sample_rows, score
from rlft.core.batch import Batch
from rlft.core.errors import DataError, RewardError
from rlft.core.metrics import Means
from rlft.data.prompts import PromptData
from rlft.data.source import holds_out
from rlft.models.base import CausalLM
from rlft.models.likelihood import perplexity
from rlft.rewards.compose import RewardSum
from rlft.rollout.engine import Rollout, generate
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer

EVAL_SEED = 0
EVAL_ROWS = 64  # prompts rolled out at once


@dataclass(frozen=True)
class Evaluator:
    """Samples one completion for each of the first `num_prompts` held-out prompts and measures them."""

    policy: CausalLM
    reference: CausalLM | None
    rewards: RewardSum
    data: PromptData
    tokenizer: Tokenizer
    sampling: Sampling
    device: torch.device
    autocast: Callable[[], AbstractContextManager]
    limits: dict[str, Any]  # max_rows, max_tokens of one forward
    has_exact_kl: bool
    num_prompts: int

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        held_out = list(self.data.prompts("validation")[: self.num_prompts])
        if not held_out:
            raise DataError(
                "the validation split has no prompt to evaluate on: give more data, a larger data.source.validation, "
                "or data.source.validation=0 to train without evaluation"
            )
        means = Means()
        samples: list[dict] = []
        for start in range(0, len(held_out), EVAL_ROWS):
            prompts = held_out[start : start + EVAL_ROWS]
            with self.autocast():
                rollout = generate(
                    self.policy, [p.ids for p in prompts], group_size=1, sampling=self.sampling, seed=EVAL_SEED,
                    eos_id=self.tokenizer.eos_id, stream="eval", first_prompt=start, device=self.device,
                )  # fmt: skip
            scored = score(self.rewards, self.tokenizer, prompts, rollout)
            add_rewards(means, scored, prefix="eval/")
            means.add("eval/completions/mean_length", rollout.rows.completion_mask.sum(dim=1))
            if self.reference is not None:
                self._add_reference(self.reference, means, rollout)
            samples += sample_rows(self.tokenizer, prompts, rollout, scored)
        texts = [row["completion"] for row in samples]
        rewards = [row["reward"] for row in samples]
        counted = torch.tensor([reward for reward in rewards if not math.isnan(reward)], dtype=torch.float64)
        if not len(counted):
            raise RewardError(f"no reward counts any of the {len(samples)} held-out completions (all returned None)")
        metrics = means.local() | {
            "eval/reward_std": float(counted.std(correction=0)),  # over completions
            "eval/distinct_1": distinct_n(texts, 1),
            "eval/distinct_2": distinct_n(texts, 2),
        }
        if "eval/reference_perplexity" in metrics:  # the mean negative logprob until here
            metrics["eval/reference_perplexity"] = perplexity(metrics["eval/reference_perplexity"])
        return Evaluation(metrics, samples)

    def plan(self) -> str:
        """Return how many prompts are evaluated, and how many were asked for where there are fewer."""
        if not holds_out(self.data):
            return NOT_EVALUATED
        available = len(self.data.prompts("validation"))
        return (
            f"{available:,}, fewer than eval_prompts={self.num_prompts:,}"
            if available < self.num_prompts
            else (f"{self.num_prompts:,} of {available:,}")
        )

    def _add_reference(self, reference: CausalLM, means: Means, rollout: Rollout) -> None:
        """Add the KL in nats a token and a completion, and the reference's loss on the policy's text."""
        batch, mask, temperature = Batch(rollout.rows), rollout.rows.completion_mask, self.sampling.temperature
        with self.autocast():
            ref = frozen_scores(reference, batch, temperature=temperature, **self.limits)
            own = frozen_scores(self.policy, batch, temperature=temperature, **self.limits)
        kl = own.logprobs - ref.logprobs
        if self.has_exact_kl:
            exact = exact_token_kl(self.policy, reference, own.hidden[mask], ref.hidden[mask], temperature=temperature)
            kl = torch.zeros_like(kl).masked_scatter(mask, exact)
        means.add("eval/kl", kl, mask)
        means.add("eval/kl_completion", torch.where(mask, kl, 0.0).sum(dim=1))
        if temperature != 1.0:  # perplexity is of the reference itself, KL of what is sampled
            with self.autocast():
                ref = frozen_scores(reference, batch, temperature=1.0, **self.limits)
        means.add("eval/reference_perplexity", -ref.logprobs, mask)


def distinct_n(texts: list[str], n: int) -> float:
    """Return distinct-n (Li et al., arXiv:1510.03055): different n-grams of words over all of them, over all texts.

    Words are split at white space and lower-cased. 0 where no text has n words. It falls with the number of texts, so
    compare it at equal numbers only.
    """
    grams = [gram for text in texts for gram in _ngrams(text.lower().split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
