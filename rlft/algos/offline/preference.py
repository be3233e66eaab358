"""Every offline algorithm on pairs: DPO, IPO, SimPO and ORPO are choices of a loss from `rlft.functional.preference`.

loss = (1 / P) sum_pairs f(logprobs, reference's logprobs), P the pairs of the whole optimizer batch; logprobs are
summed over a completion's tokens, its end-of-text token included. The reference is frozen and scored without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlft.algos.base import Run, Setup, check_shared
from rlft.algos.offline.on_examples import OnExamples, completion_rows
from rlft.algos.pairs import ROWS_PER_PAIR, PairLoss, check_pair_loss, uses_reference
from rlft.core.batch import Batch
from rlft.core.metrics import Metrics
from rlft.core.ranges import Size
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.models.likelihood import summed_logprobs
from rlft.models.scorer import Scorer


class Preference(OnExamples):
    """Training on pairs of a chosen and a rejected completion; the prompt is forwarded once for both.

    Arguments:
        loss: from logprobs of pairs to a loss for each (`PairLoss` says what it may take).
        beta: the loss's beta.
        pairs_per_step: in an optimizer batch, over all ranks.
        eval_pairs: held-out pairs of an evaluation; None for all of them.
    """

    reads = (Kind.PREFERENCES,)
    has_samples = True

    def __init__(
        self, run: Run, *, loss: Callable[..., Tensor], beta: float, pairs_per_step: Size, eval_pairs: Size | None
    ) -> None:
        super().__init__(run, per_step=pairs_per_step, num_held_out=eval_pairs)
        self.pair_loss = PairLoss(loss, beta=beta)

    @staticmethod
    def uses_reference(**settings: Any) -> bool:
        return uses_reference(settings["loss"])

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        """Raise `ConfigError` for a loss that is none on pairs or lacks its reference."""
        check_pair_loss(settings["loss"], beta=settings["beta"], has_reference=setup.has_reference)
        check_shared("algo.pairs_per_step", settings["pairs_per_step"], setup)

    def make_batch(self, examples: list[Example]) -> Batch:
        run = self.run
        batch = Batch(completion_rows(examples, device=run.device), rows_per_unit=ROWS_PER_PAIR)
        if self.pair_loss.needs_reference:
            assert run.reference is not None
            with run.clock("reference"), run.autocast():
                batch.values["ref_logprobs"] = summed_logprobs(run.reference, batch, limits=run.settings.limits)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, metrics: Metrics, *, prefix: str) -> Tensor:
        mask, scores = batch.rows.completion_mask, scorer(batch.rows)
        metrics.add(f"{prefix}entropy", scores.entropy, mask)
        return self.pair_loss(
            scores.logprobs.sum(dim=1), mask.sum(dim=1), batch.values.get("ref_logprobs"), metrics, prefix=prefix
        )
