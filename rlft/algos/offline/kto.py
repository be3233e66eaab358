"""KTO (Ethayarajh et al., arXiv:2402.01306): completions that are desirable or not, without pairs.

loss = (1 / B) sum_i kto(r_i, z0), r_i the summed log ratio to the reference, B the rows of the whole optimizer batch.

z0 = max(0, mean_i r(x_i, y_{i-1})) pairs each prompt with the completion of the row before, over the whole optimizer
batch, by the policy that begins the step. (TRL: over the micro-batch of a device, so that its loss depends on how the
batch is cut.) A mismatched completion that runs past the model's context is cut there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor

from rlft.algos.base import Evaluation, Run, Setup, check_shared
from rlft.algos.offline.on_examples import OnExamples, completion_rows
from rlft.core.batch import Batch
from rlft.core.errors import ConfigError, DataError
from rlft.core.metrics import Metrics
from rlft.core.ranges import Positive, Range
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.functional.preference import kto, kto_reference_point
from rlft.models.base import CausalLM
from rlft.models.likelihood import summed_logprobs
from rlft.models.scorer import Scorer

AtLeastTwo = Annotated[int, Range(2, 2**31 - 1)]


class KTO(OnExamples):
    """Training on completions with a judgement.

    Arguments:
        beta, desirable_weight, undesirable_weight: as for `rlft.functional.preference.kto`.
        rows_per_step: completions in an optimizer batch, at least 2: each also serves another prompt for z0.
        eval_rows: held-out completions of an evaluation, at least 2 for the same reason; None for all of them.
    """

    reads = (Kind.UNPAIRED,)
    has_samples = True

    def __init__(
        self,
        run: Run,
        *,
        beta: Positive,
        desirable_weight: Positive,
        undesirable_weight: Positive,
        rows_per_step: AtLeastTwo,
        eval_rows: AtLeastTwo | None,
    ) -> None:
        super().__init__(run, per_step=rows_per_step, num_held_out=eval_rows)
        for split in ("train", "validation"):
            if len(run.data.examples(split)) == 1:
                where = run.data.examples(split)[0].prompt.where
                raise DataError(
                    f"the {split} split has 1 completion, {where}: algo=kto takes each prompt with another row's "
                    f"completion for z0, and needs at least 2: give more rows"
                )
        self.beta, self.weights = beta, {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}

    @staticmethod
    def uses_reference(**settings: Any) -> bool:
        return True

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        """Raise `ConfigError` without a reference, and for several processes."""
        check_shared("algo.rows_per_step", settings["rows_per_step"], setup)
        if not setup.has_reference:
            raise ConfigError("algo=kto compares the policy with a reference: set reference=initial")
        if setup.world_size > 1:
            raise ConfigError("algo=kto estimates z0 over the whole batch, and so far does so in one process only")

    def make_batch(self, examples: list[Example]) -> Batch:
        batch = Batch(completion_rows(examples, device=self.run.device))
        with self.run.clock("reference"), self.run.autocast():
            batch.values["ref_logprobs"] = self._summed_logprobs(self.run.reference, batch)
            z0 = self._reference_point(examples)
        is_desirable = [example.label == 1 for example in examples]
        batch.values["z0"] = z0.expand(batch.num_rows)
        batch.values["is_desirable"] = torch.tensor(is_desirable, device=self.run.device)
        batch.metrics.add("kl", z0)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, metrics: Metrics, *, prefix: str) -> Tensor:
        mask, values, scores = batch.rows.completion_mask, batch.values, scorer(batch.rows)
        logprobs, is_desirable = scores.logprobs.sum(dim=1), values["is_desirable"]
        rewards = self.beta * (logprobs - values["ref_logprobs"])
        metrics.add(f"{prefix}entropy", scores.entropy, mask)
        for name, which in (("chosen", is_desirable), ("rejected", ~is_desirable)):
            metrics.add(f"{prefix}rewards/{name}", rewards, which)
            metrics.add(f"{prefix}logps/{name}", logprobs, which)
        return kto(logprobs, values["ref_logprobs"], is_desirable, values["z0"], beta=self.beta, **self.weights)

    def evaluate(self) -> Evaluation:
        """Return the loss on held-out completions, z0 taken over all of them, with TRL's margin of mean rewards."""
        evaluation = super().evaluate()
        metrics = evaluation.metrics
        if "eval/rewards/chosen" in metrics and "eval/rewards/rejected" in metrics:
            metrics["eval/rewards/margins"] = metrics["eval/rewards/chosen"] - metrics["eval/rewards/rejected"]
        return evaluation

    def _summed_logprobs(self, model: CausalLM | None, batch: Batch) -> Tensor:
        assert model is not None
        return summed_logprobs(model, batch, limits=self.run.settings.limits)

    def _reference_point(self, examples: list[Example]) -> Tensor:
        """Return z0, a scalar, of each prompt with the completion of the row before."""
        mismatched = []
        for example, before in zip(examples, [examples[-1], *examples[:-1]], strict=True):
            room = self.run.policy.context_length - len(example.prompt.ids)
            mismatched.append(replace(example, completions=(before.completions[0][:room],)))
        batch = Batch(completion_rows(mismatched, device=self.run.device))
        own, ref = (self._summed_logprobs(model, batch) for model in (self.run.policy, self.run.reference))
        return kto_reference_point(own, ref)
