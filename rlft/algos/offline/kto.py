"""KTO (Ethayarajh et al., arXiv:2402.01306): completions that are desirable or not, without pairs.

loss = (1 / B) sum_i kto(r_i, z0), r_i the summed log ratio to the reference, B the rows of the whole optimizer batch.

z0 = max(0, mean_i r(x_i, y_{i-1})) pairs each prompt with the completion of the row before, over the whole optimizer
batch, by the policy that begins the step. (TRL: over the micro-batch of a device, so that its loss depends on how the
batch is cut.) A mismatched completion that runs past the model's context is cut there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft.algos.base import Evaluation
from rlft.algos.offline.examples import (
    OnExamples,
    check_held_out,
    check_sizes,
    completion_rows,
    held_out,
    show_samples,
    summed_logprobs,
)
from rlft.core.batch import Batch
from rlft.core.errors import ConfigError, DataError
from rlft.core.metrics import Clock, Means
from rlft.core.ranges import Size
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.data.labelled import UnpairedData
from rlft.functional.preference import kto, kto_reference_point
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer


class KTO(OnExamples):
    """Training on completions with a judgement.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        beta, desirable_weight, undesirable_weight: as for `rlft.functional.preference.kto`.
        rows_per_step: completions in an optimizer batch, at least 2: each also serves another prompt for z0.
        eval_rows: held-out completions of an evaluation, at least 2 for the same reason; None for all of them.
        micro_batch, micro_batch_tokens: what one forward without a gradient may hold.
    """

    reads = (Kind.UNPAIRED,)

    def __init__(
        self,
        *,
        policy: CausalLM,
        reference: CausalLM,
        data: UnpairedData,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        rank: int,
        world_size: int,
        clock: Clock,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        rows_per_step: Size,
        eval_rows: Size | None,
        micro_batch: Size | None,
        micro_batch_tokens: Size | None,
    ) -> None:
        self.check(
            has_reference=reference is not None, world_size=world_size, beta=beta, desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight, rows_per_step=rows_per_step, eval_rows=eval_rows,
        )  # fmt: skip
        super().__init__(
            policy=policy, data=data, seed=seed, device=device, autocast=autocast, rank=rank, world_size=world_size,
            per_step=rows_per_step, num_held_out=eval_rows, micro_batch=micro_batch,
            micro_batch_tokens=micro_batch_tokens,
        )  # fmt: skip
        self.reference, self.tokenizer, self.sampling, self.clock = reference, tokenizer, sampling, clock
        for split in ("train", "validation"):
            if len(data.examples(split)) == 1:
                raise DataError(
                    f"the {split} split has 1 completion, {data.examples(split)[0].prompt.where}: algo=kto takes each "
                    f"prompt with another row's completion for z0, and needs at least 2: give more rows"
                )
        self.beta, self.weights = beta, {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}

    @staticmethod
    def check(  # type: ignore[override]  # it names the settings that it looks at
        *,
        has_reference: bool,
        world_size: int,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        rows_per_step: Size,
        eval_rows: int | None,
        **_: Any,
    ) -> None:
        """Raise `ConfigError` without a reference, for a value out of its range, and for several processes."""
        check_sizes(setting="algo.rows_per_step", per_step=rows_per_step, at_least=2, world_size=world_size)
        check_held_out(setting="algo.eval_rows", count=eval_rows, at_least=2)
        values = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, value in values.items():
            if not value > 0:
                raise ConfigError(f"algo.{name}={value} must be above 0")
        if not has_reference:
            raise ConfigError("algo=kto compares the policy with a reference: set reference=initial")
        if world_size > 1:
            raise ConfigError("algo=kto estimates z0 over the whole batch, and so far does so in one process only")

    def make_batch(self, examples: list[Example]) -> Batch:
        batch = Batch(completion_rows(examples, device=self.device))
        with self.clock("reference"), self.autocast():
            batch.values["ref_logprobs"] = summed_logprobs(self.reference, batch, limits=self.limits)
            z0 = self._reference_point(examples)
        batch.values["z0"] = z0.expand(batch.num_rows)
        batch.values["is_desirable"] = torch.tensor([example.label == 1 for example in examples], device=self.device)
        batch.means.add("kl", z0)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, means: Means, *, prefix: str) -> Tensor:
        mask, values, scores = batch.rows.completion_mask, batch.values, scorer(batch.rows)
        logprobs, is_desirable = scores.logprobs.sum(dim=1), values["is_desirable"]
        rewards = self.beta * (logprobs - values["ref_logprobs"])
        means.add(f"{prefix}entropy", scores.entropy, mask)
        for name, which in (("chosen", is_desirable), ("rejected", ~is_desirable)):
            means.add(f"{prefix}rewards/{name}", rewards, which)
            means.add(f"{prefix}logps/{name}", logprobs, which)
        return kto(logprobs, values["ref_logprobs"], is_desirable, values["z0"], beta=self.beta, **self.weights)

    def evaluate(self) -> Evaluation:
        """Return the loss on held-out completions, z0 taken over all of them, with TRL's margin of mean rewards."""
        evaluation = super().evaluate()
        metrics = evaluation.metrics
        if "eval/rewards/chosen" in metrics and "eval/rewards/rejected" in metrics:
            metrics["eval/rewards/margins"] = metrics["eval/rewards/chosen"] - metrics["eval/rewards/rejected"]
        return evaluation

    def samples(self) -> list[dict]:
        examples = held_out(self.data, self.num_held_out)
        return show_samples(self.policy, self.tokenizer, examples, sampling=self.sampling, device=self.device)

    def _reference_point(self, examples: list[Example]) -> Tensor:
        """Return z0, a scalar, of each prompt with the completion of the row before."""
        mismatched = []
        for example, before in zip(examples, [examples[-1], *examples[:-1]], strict=True):
            room = self.policy.context_length - len(example.prompt.ids)
            mismatched.append(replace(example, completions=(before.completions[0][:room],)))
        batch = Batch(completion_rows(mismatched, device=self.device))
        own, ref = (summed_logprobs(model, batch, limits=self.limits) for model in (self.policy, self.reference))
        return kto_reference_point(own, ref)
