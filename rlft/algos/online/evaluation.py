"""The evaluation of a sampling policy on held-out prompts: rewards, KL, diversity and fluency.

The prompts and the uniforms that draw the completions are the same at every evaluation of every run, so that two
evaluations differ by the policy alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlft.algos.base import NOT_EVALUATED, Evaluation, Run
from rlft.algos.online.scoring import exact_token_kl, scored_by
from rlft.algos.samples import draw
from rlft.core.errors import DataError, RewardError
from rlft.core.metrics import Metrics
from rlft.data.source import holds_out
from rlft.models.base import CausalLM
from rlft.models.likelihood import perplexity
from rlft.rollout.engine import Rollout
from rlft.rollout.sampling import Sampling

PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Evaluator:
    """Samples one completion for each of the first `eval_prompts` held-out prompts and measures them."""

    run: Run
    sampling: Sampling
    has_exact_kl: bool

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        run = self.run
        held_out = list(run.data.prompts("validation")[: run.settings.eval_prompts])
        if not held_out:
            raise DataError(
                "the validation split has no prompt to evaluate on: give more data, a larger data.source.validation, "
                "or data.source.validation=0 to train without evaluation"
            )
        assert run.rewards is not None
        metrics, rows = Metrics(), list[dict]()
        for start in range(0, len(held_out), PROMPTS_AT_ONCE):
            prompts = held_out[start : start + PROMPTS_AT_ONCE]
            samples = draw(run, prompts, sampling=self.sampling, first_prompt=start).score(run.rewards)
            samples.add_rewards(metrics, prefix="eval/")
            lengths = samples.rollout.rows.completion_mask.sum(dim=1)
            metrics.add("eval/completions/mean_length", lengths)
            if run.reference is not None:
                self._add_reference(run.reference, metrics, samples.rollout)
            rows += samples.rows()
        return Evaluation(self._summary(metrics.local(), rows), rows)

    def plan(self) -> str:
        """Return how many prompts are evaluated, and how many were asked for where there are fewer."""
        if not holds_out(self.run.data):
            return NOT_EVALUATED
        available, wanted = len(self.run.data.prompts("validation")), self.run.settings.eval_prompts
        is_short = available < wanted
        return f"{available:,}, fewer than eval_prompts={wanted:,}" if is_short else f"{wanted:,} of {available:,}"

    def _summary(self, metrics: dict[str, float], rows: list[dict]) -> dict[str, float]:
        """Return the metrics with what is measured on all completions together."""
        texts, rewards = [row["completion"] for row in rows], [row["reward"] for row in rows]
        counted = torch.tensor([reward for reward in rewards if not math.isnan(reward)], dtype=torch.float64)
        if not len(counted):
            raise RewardError(f"no reward counts any of the {len(rows)} held-out completions (all returned None)")
        metrics |= {
            "eval/reward_std": float(counted.std(correction=0)),  # over completions
            "eval/distinct_1": distinct_n(texts, 1),
            "eval/distinct_2": distinct_n(texts, 2),
        }
        if "eval/reference_perplexity" in metrics:  # the mean negative logprob until here
            metrics["eval/reference_perplexity"] = perplexity(metrics["eval/reference_perplexity"])
        return metrics

    def _add_reference(self, reference: CausalLM, metrics: Metrics, rollout: Rollout) -> None:
        """Add the KL in nats a token and a completion, and the reference's loss on the policy's text."""
        run, rows, mask, temperature = self.run, rollout.rows, rollout.rows.completion_mask, self.sampling.temperature
        ref = scored_by(reference, rows, run, temperature=temperature)
        own = scored_by(run.policy, rows, run, temperature=temperature)
        kl = own.logprobs - ref.logprobs
        if self.has_exact_kl:
            exact = exact_token_kl(run.policy, reference, own.hidden[mask], ref.hidden[mask], temperature=temperature)
            kl = torch.zeros_like(kl).masked_scatter(mask, exact)
        metrics.add("eval/kl", kl, mask)
        metrics.add("eval/kl_completion", torch.where(mask, kl, 0.0).sum(dim=1))
        if temperature != 1.0:  # perplexity is of the reference itself, KL of what is sampled
            ref = scored_by(reference, rows, run, temperature=1.0)
        metrics.add("eval/reference_perplexity", -ref.logprobs, mask)


def distinct_n(texts: list[str], n: int) -> float:
    """Return distinct-n (Li et al., arXiv:1510.03055): different n-grams of words over all of them, over all texts.

    Words are split at white space and lower-cased. 0 where no text has n words. It falls with the number of texts, so
    compare it at equal numbers only.
    """
    grams = [gram for text in texts for gram in _ngrams(text.lower().split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
