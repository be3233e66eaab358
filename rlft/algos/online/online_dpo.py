"""Online DPO (Guo et al., OAIF, arXiv:2402.04792): pairs of the policy's own completions, with the reward as judge.

A group is sampled for each prompt; the completions of largest and smallest reward are its pair (the paper: two samples,
a language model as judge). The loss is that of `rlft/algos/offline/preference.py`, of the current policy's logprobs at
the sampling temperature, and so needs no correction for who sampled:

    loss = (1 / P) sum_pairs f(logprobs, reference's logprobs),   P = prompts_per_step

Groups without spread are left out, which is a loss of 0: P counts them, so that few pairs make a small step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft.algos.base import Algorithm, Evaluation, Run, Setup, check_shared
from rlft.algos.online.evaluation import Evaluator
from rlft.algos.online.rollouts import Rollouts
from rlft.algos.online.scoring import check_sampler, is_exact_kl_logged
from rlft.algos.pairs import ROWS_PER_PAIR, PairLoss, check_pair_loss
from rlft.algos.samples import Samples
from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.core.ranges import SizeOrZero
from rlft.data.kinds import Kind
from rlft.functional.preference import best_and_worst
from rlft.models.likelihood import summed_logprobs
from rlft.models.scorer import Scorer


class OnlineDPO(Algorithm):
    """DPO, or another loss on pairs, of completions that the policy just sampled.

    Arguments:
        loss, beta: as for `rlft.algos.offline.preference.Preference`.
        samples_per_step: completions written to samples.jsonl each step.
    """

    reads = (Kind.PROMPTS, Kind.CONTEXTS)
    uses_rewards = True
    objective = ("eval/reward", "max")

    def __init__(self, run: Run, *, loss: Callable[..., Tensor], beta: float, samples_per_step: SizeOrZero) -> None:
        super().__init__(run)
        self.pair_loss, self.samples_per_step = PairLoss(loss, beta=beta), samples_per_step
        self.rollouts = Rollouts(run, sampling=run.sampling)
        self.evaluator = Evaluator(run, run.sampling, has_exact_kl=is_exact_kl_logged(run))

    @staticmethod
    def uses_reference(**settings: Any) -> bool:
        return True  # an evaluation measures the KL to it, whatever the loss

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        """Raise `ConfigError` for a loss that is none on pairs or lacks its reference, and for groups of one."""
        check_pair_loss(settings["loss"], beta=settings["beta"], has_reference=setup.has_reference)
        check_shared("prompts_per_step", setup.settings.prompts_per_step, setup)
        if (group_size := setup.settings.group_size) < 2:
            raise ConfigError(f"group_size={group_size}: a pair needs at least 2 samples of a prompt")

    def collect(self, batch_index: int) -> Batch:
        """prompts -> rollout -> rewards -> pairs. The batch holds all samples, and trains on the pairs."""
        samples = self.rollouts(batch_index)
        best, worst, is_pair = best_and_worst(samples.total, group_size=samples.group_size)
        rollout, metrics = samples.rollout, Metrics()
        samples.add_rollout(metrics)
        metrics.add("objective/scores_margin", samples.total[best] - samples.total[worst], is_pair)
        # A rank without any pair keeps one, which does not count, so that every rank takes part in the step.
        kept = is_pair.nonzero()[:, 0] if is_pair.any() else torch.tensor([0])
        index = torch.stack([best[kept], worst[kept]], dim=1).flatten().to(self.run.device)
        everything = Batch(rollout.rows, {"old_logprobs": rollout.logprobs}, metrics, self._shown(samples, best, worst))
        pairs = replace(everything.select(index), rows_per_unit=ROWS_PER_PAIR)
        pairs.values["is_pair"] = is_pair[kept].repeat_interleave(ROWS_PER_PAIR).to(self.run.device)
        if self.pair_loss.needs_reference:
            pairs.values["ref_logprobs"] = self._ref_logprobs(pairs)
        return replace(everything, trained=pairs)

    def minibatch(self, batch: Batch, update: int, *, before: dict[str, float]) -> Batch | None:
        return batch.trained

    def loss(
        self, scorer: Scorer, batch: Batch, denominators: Denominators, metrics: Metrics, *, update: int
    ) -> Tensor:
        mask, values = batch.rows.completion_mask, batch.values
        scores = scorer(batch.rows, temperature=self.run.settings.temperature)
        metrics.add("entropy", scores.entropy, mask)
        check_sampler(scores.logprobs, values["old_logprobs"], mask, metrics, is_float32=self.run.is_float32)
        is_pair = values["is_pair"][0::2]
        losses = self.pair_loss(
            scores.logprobs.sum(dim=1), mask.sum(dim=1), values.get("ref_logprobs"), metrics, is_counted=is_pair
        )
        return torch.where(is_pair, losses, 0.0).sum() / self.run.settings.prompts_per_step

    def evaluate(self) -> Evaluation:
        return self.evaluator()

    def plan(self) -> list[tuple[str, str]]:
        pairs = ("pairs per step", f"at most {self.run.settings.prompts_per_step:,}")
        return [*self.rollouts.plan(), pairs, self.rollouts.rewards_plan(), *self.run.data_plan]

    def _ref_logprobs(self, pairs: Batch) -> Tensor:
        run = self.run
        assert run.reference is not None
        with run.clock("reference"), run.autocast():
            return summed_logprobs(
                run.reference, pairs, limits=run.settings.limits, temperature=run.settings.temperature
            )

    def _shown(self, samples: Samples, best: Tensor, worst: Tensor) -> list[dict]:
        place = dict.fromkeys(best.tolist(), "chosen") | dict.fromkeys(worst.tolist(), "rejected")
        return [row | {"pair": place.get(i)} for i, row in enumerate(samples.rows(self.samples_per_step))]
