"""Online DPO (Guo et al., OAIF, arXiv:2402.04792): pairs of the policy's own completions, with the reward as judge.

A group is sampled for each prompt; the completions of largest and smallest reward are its pair (the paper: two samples,
a language model as judge). The loss is that of `rlft/algos/offline/preference.py`, of the current policy's logprobs at
the sampling temperature, and so needs no correction for who sampled:

    loss = (1 / P) sum_pairs f(logprobs, reference's logprobs),   P = prompts_per_step

Groups without spread are left out, which is a loss of 0: P counts them, so that few pairs make a small step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft.algos.base import Algorithm, Evaluation
from rlft.algos.offline.examples import check_sizes, summed_logprobs
from rlft.algos.online.agreement import check_sampler
from rlft.algos.online.evaluation import Evaluator
from rlft.algos.online.reference import EXACT_KL_VOCABULARY
from rlft.algos.online.rollouts import Rollouts, Sampled
from rlft.algos.online.scoring import add_rollout, sample_rows
from rlft.algos.pairs import ROWS_PER_PAIR, PairLoss, check_pair_loss
from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Clock, Means
from rlft.core.ranges import Size, SizeOrZero
from rlft.data.kinds import Kind
from rlft.data.prompts import PromptData
from rlft.data.source import holds_out
from rlft.functional.preference import best_and_worst
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer
from rlft.rewards.compose import RewardSum
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer


class OnlineDPO(Algorithm):
    """DPO, or another loss on pairs, of completions that the policy just sampled.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        loss, beta: as for `rlft.algos.offline.preference.Preference`.
        prompts_per_step, group_size: over all ranks; samples per prompt, of which the best and the worst are a pair.
        eval_prompts: held-out prompts of an evaluation, one completion each.
        micro_batch, micro_batch_tokens: what one forward of the reference may hold.
        samples_per_step: completions written to samples.jsonl each step.
    """

    reads = (Kind.PROMPTS, Kind.CONTEXTS)
    objective = ("eval/reward", "max")

    def __init__(
        self,
        *,
        policy: CausalLM,
        reference: CausalLM | None,
        rewards: RewardSum,
        data: PromptData,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        is_float32: bool,
        rank: int,
        world_size: int,
        clock: Clock,
        loss: Callable[..., Tensor],
        beta: float,
        prompts_per_step: Size,
        group_size: Size,
        eval_prompts: Size,
        micro_batch: Size | None,
        micro_batch_tokens: Size | None,
        samples_per_step: SizeOrZero,
    ) -> None:
        self.check(
            has_reference=reference is not None, world_size=world_size, loss=loss, beta=beta,
            prompts_per_step=prompts_per_step, group_size=group_size,
        )  # fmt: skip
        self.pair_loss, self.policy, self.reference = PairLoss(loss, beta=beta), policy, reference
        self.tokenizer, self.sampling, self.device = tokenizer, sampling, device
        self.autocast, self.is_float32, self.clock = autocast, is_float32, clock
        self.prompts_per_step, self.group_size, self.samples_per_step = prompts_per_step, group_size, samples_per_step
        self.limits: dict[str, Any] = {"max_rows": micro_batch, "max_tokens": micro_batch_tokens}
        self.rollouts = Rollouts(
            policy=policy, rewards=rewards, data=data, tokenizer=tokenizer, sampling=sampling, seed=seed, device=device,
            autocast=autocast, clock=clock, rank=rank, world_size=world_size, prompts_per_step=prompts_per_step,
            group_size=group_size, max_draws=1,
        )  # fmt: skip
        self.evaluator = Evaluator(
            policy=policy, reference=reference, rewards=rewards, data=data, tokenizer=tokenizer, sampling=sampling,
            device=device, autocast=autocast, limits=self.limits, num_prompts=eval_prompts,
            has_exact_kl=reference is not None and policy.vocab_size <= EXACT_KL_VOCABULARY,
        )  # fmt: skip
        self._pairs: Batch | None = None

    @staticmethod
    def check(  # type: ignore[override]  # it names the settings that it looks at
        *,
        has_reference: bool,
        world_size: int,
        loss: Callable[..., Any],
        beta: float,
        prompts_per_step: Size,
        group_size: Size,
        **_: Any,
    ) -> None:
        """Raise `ConfigError` for a loss that is none on pairs or lacks its reference, and for groups of one."""
        check_pair_loss(loss, beta=beta, has_reference=has_reference)
        check_sizes(setting="prompts_per_step", per_step=prompts_per_step, at_least=1, world_size=world_size)
        if group_size < 2:
            raise ConfigError(f"group_size={group_size}: a pair needs at least 2 samples of a prompt")

    def collect(self, batch_index: int) -> Batch:
        """prompts -> rollout -> rewards -> pairs. The batch holds all samples; `minibatch` returns the pairs."""
        sampled = self.rollouts(batch_index)
        best, worst, is_pair = best_and_worst(sampled.scored.total, group_size=self.group_size)
        rollout, means = sampled.rollout, Means()
        add_rollout(means, sampled.scored, rollout, group_size=self.group_size)
        means.add("objective/scores_margin", (sampled.scored.total[best] - sampled.scored.total[worst]), is_pair)
        # A rank without any pair keeps one, which does not count, so that every rank takes part in the step.
        kept = is_pair.nonzero()[:, 0] if is_pair.any() else torch.tensor([0])
        index = torch.stack([best[kept], worst[kept]], dim=1).flatten().to(self.device)
        everything = Batch(rollout.rows, {"old_logprobs": rollout.logprobs}, means, self._samples(sampled, best, worst))
        pairs = replace(everything.select(index), rows_per_unit=ROWS_PER_PAIR)
        pairs.values["is_pair"] = is_pair[kept].repeat_interleave(ROWS_PER_PAIR).to(self.device)
        if self.reference is not None and self.pair_loss.needs_reference:
            with self.clock("reference"), self.autocast():
                pairs.values["ref_logprobs"] = summed_logprobs(
                    self.reference, pairs, limits=self.limits, temperature=self.sampling.temperature
                )
        self._pairs = pairs
        return everything

    def minibatch(self, batch: Batch, update: int) -> Batch:
        assert self._pairs is not None
        return self._pairs

    def loss(self, scorer: Scorer, batch: Batch, totals: Denominators, means: Means, *, update: int) -> Tensor:
        mask, values = batch.rows.completion_mask, batch.values
        scores = scorer(batch.rows, temperature=self.sampling.temperature)
        means.add("entropy", scores.entropy, mask)
        check_sampler(scores.logprobs, values["old_logprobs"], mask, means, is_float32=self.is_float32)
        is_pair = values["is_pair"][0::2]
        losses = self.pair_loss(
            scores.logprobs.sum(dim=1), mask.sum(dim=1), values.get("ref_logprobs"), means, is_counted=is_pair
        )
        return torch.where(is_pair, losses, 0.0).sum() / self.prompts_per_step

    def evaluate(self) -> Evaluation:
        return self.evaluator()

    @property
    def is_evaluated(self) -> bool:
        return holds_out(self.rollouts.data)

    def plan(self) -> list[tuple[str, str]]:
        rewards = self.rollouts.rewards
        return [
            *self.rollouts.plan(),
            ("pairs per step", f"at most {self.prompts_per_step:,}"),
            ("rewards", ", ".join(f"{weight:g} x {name}" for name, weight in rewards.weights.items())),
            *((f"data: {name}", f"{count:,}") for name, count in self.rollouts.data.counts.items()),
        ]

    def _samples(self, sampled: Sampled, best: Tensor, worst: Tensor) -> list[dict]:
        rows = sample_rows(
            self.tokenizer, sampled.prompt_of_row, sampled.rollout, sampled.scored, count=self.samples_per_step
        )
        place = dict.fromkeys(best.tolist(), "chosen") | dict.fromkeys(worst.tolist(), "rejected")
        return [row | {"pair": place.get(i)} for i, row in enumerate(rows)]
