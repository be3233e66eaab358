"""Every offline algorithm on pairs: DPO, IPO, SimPO and ORPO are choices of a loss from `rlft.functional.preference`.

loss = (1 / P) sum_pairs f(logprobs, reference's logprobs), P the pairs of the whole optimizer batch; logprobs are
summed over a completion's tokens, its end-of-text token included. The reference is frozen and scored without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlft.algos.offline.examples import (
    OnExamples,
    check_held_out,
    check_sizes,
    completion_rows,
    held_out,
    show_samples,
    summed_logprobs,
)
from rlft.algos.pairs import ROWS_PER_PAIR, PairLoss, check_pair_loss
from rlft.core.batch import Batch
from rlft.core.metrics import Clock, Means
from rlft.core.ranges import Size
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.data.preferences import PreferenceData
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer


class Preference(OnExamples):
    """Training on pairs of a chosen and a rejected completion; the prompt is forwarded once for both.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        loss: from logprobs of pairs to a loss for each (`PairLoss` says what it may take).
        beta: the loss's beta.
        pairs_per_step: in an optimizer batch, over all ranks.
        eval_pairs: held-out pairs of an evaluation; None for all of them.
        micro_batch, micro_batch_tokens: what one forward of the reference may hold.
    """

    reads = (Kind.PREFERENCES,)

    def __init__(
        self,
        *,
        policy: CausalLM,
        reference: CausalLM | None,
        data: PreferenceData,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        rank: int,
        world_size: int,
        clock: Clock,
        loss: Callable[..., Tensor],
        beta: float,
        pairs_per_step: Size,
        eval_pairs: Size | None,
        micro_batch: Size | None,
        micro_batch_tokens: Size | None,
    ) -> None:
        self.check(
            has_reference=reference is not None, world_size=world_size, loss=loss, beta=beta,
            pairs_per_step=pairs_per_step, eval_pairs=eval_pairs,
        )  # fmt: skip
        super().__init__(
            policy=policy, data=data, seed=seed, device=device, autocast=autocast, rank=rank, world_size=world_size,
            per_step=pairs_per_step, num_held_out=eval_pairs, micro_batch=micro_batch,
            micro_batch_tokens=micro_batch_tokens,
        )  # fmt: skip
        self.pair_loss, self.tokenizer, self.sampling, self.clock = (
            PairLoss(loss, beta=beta),
            tokenizer,
            sampling,
            clock,
        )
        self.reference = reference if self.pair_loss.needs_reference else None

    @staticmethod
    def check(  # type: ignore[override]  # it names the settings that it looks at
        *,
        has_reference: bool,
        world_size: int,
        loss: Callable[..., Any],
        beta: float,
        pairs_per_step: Size,
        eval_pairs: int | None,
        **_: Any,
    ) -> None:
        """Raise `ConfigError` for a loss that is none on pairs or lacks its reference, and for a wrong size."""
        check_pair_loss(loss, beta=beta, has_reference=has_reference)
        check_sizes(setting="algo.pairs_per_step", per_step=pairs_per_step, at_least=1, world_size=world_size)
        check_held_out(setting="algo.eval_pairs", count=eval_pairs)

    def make_batch(self, examples: list[Example]) -> Batch:
        batch = Batch(completion_rows(examples, device=self.device), rows_per_unit=ROWS_PER_PAIR)
        if self.reference is not None:
            with self.clock("reference"), self.autocast():
                batch.values["ref_logprobs"] = summed_logprobs(self.reference, batch, limits=self.limits)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, means: Means, *, prefix: str) -> Tensor:
        mask, scores = batch.rows.completion_mask, scorer(batch.rows)
        means.add(f"{prefix}entropy", scores.entropy, mask)
        return self.pair_loss(
            scores.logprobs.sum(dim=1), mask.sum(dim=1), batch.values.get("ref_logprobs"), means, prefix=prefix
        )

    def samples(self) -> list[dict]:
        examples = held_out(self.data, self.num_held_out)
        return show_samples(self.policy, self.tokenizer, examples, sampling=self.sampling, device=self.device)
