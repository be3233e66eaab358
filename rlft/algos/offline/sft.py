"""Supervised language-model training on plain text, or on completions of prompts: the mean loss per token.

loss = -(1 / N) sum log pi(x_t | x_<t), N the tokens of the whole optimizer batch that count: of plain text all, behind
a prompt those of the completion, its end-of-text token included. Perplexity is the exponential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlft.algos.base import Algorithm, Evaluation, Run, Setup, check_shared
from rlft.algos.offline.on_examples import check_room, completion_rows, held_out, show_samples
from rlft.algos.samples import NUM_SHOWN, draw
from rlft.core.batch import Batch, Denominators, Rows
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.core.ranges import Size
from rlft.data.completions import CompletionData
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.data.prompts import Prompt
from rlft.functional.aggregation import token_mean
from rlft.models.likelihood import EVAL_ROWS, mean_loss, perplexity, text_rows
from rlft.models.scorer import Scorer


class SFT(Algorithm):
    """Next-token training on blocks of plain text or on completions, evaluated by the perplexity of held-out ones.

    Samples of an evaluation begin with the end-of-text token, or continue held-out prompts.

    Arguments:
        rows_per_step: blocks or completions in an optimizer batch, over all ranks.
        eval_blocks: held-out blocks or completions that an evaluation reads; None for all of them.
    """

    reads = (Kind.TEXT, Kind.COMPLETIONS)
    objective = ("eval/loss", "min")

    def __init__(self, run: Run, *, rows_per_step: Size, eval_blocks: Size | None) -> None:
        super().__init__(run)
        if isinstance(run.data, CompletionData):
            check_room(run.data, context_length=run.policy.context_length)
        elif run.data.block_size > run.policy.context_length:
            raise ConfigError(
                f"data.block_size={run.data.block_size} must be at most {run.policy.context_length}, the model's "
                f"context"
            )
        self.rows_per_step, self.eval_blocks = rows_per_step, eval_blocks

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        check_shared("algo.rows_per_step", settings["rows_per_step"], setup)

    def collect(self, batch_index: int) -> Batch:
        drawn = self.run.data.batch(batch_index, size=self.rows_per_step, seed=self.run.settings.seed)
        return Batch(self._rows(drawn[self.run.rank :: self.run.world_size]))

    def loss(
        self, scorer: Scorer, batch: Batch, denominators: Denominators, metrics: Metrics, *, update: int
    ) -> Tensor:
        scores = scorer(batch.rows)
        mask = batch.rows.completion_mask
        metrics.add("entropy", scores.entropy, mask)
        return token_mean(-scores.logprobs, mask, num_tokens=denominators.num_tokens)

    def evaluate(self) -> Evaluation:
        loss = mean_loss(self.run.policy, map(self._rows, self._held_out()))
        return Evaluation({"eval/loss": loss, "eval/perplexity": perplexity(loss)}, self._samples())

    def plan(self) -> list[tuple[str, str]]:
        if isinstance(self.run.data, CompletionData):
            return [("completions per step", f"{self.rows_per_step:,}"), *self.run.data_plan]
        block = self.run.data.block_size
        tokens = f"{self.rows_per_step} blocks x {block} = {self.rows_per_step * block:,}"
        return [("tokens per step", tokens), *self.run.data_plan]

    def _held_out(self) -> Sequence[Tensor | list[Example]]:
        """Return what an evaluation reads, in pieces of EVAL_ROWS."""
        data = self.run.data
        if not isinstance(data, CompletionData):
            return data.validation(max_blocks=self.eval_blocks).split(EVAL_ROWS)
        examples = held_out(data, self.eval_blocks)
        return [examples[start : start + EVAL_ROWS] for start in range(0, len(examples), EVAL_ROWS)]

    def _rows(self, drawn: Tensor | list[Example]) -> Rows:
        if isinstance(drawn, Tensor):
            return text_rows(drawn.to(self.run.device))
        return completion_rows(drawn, device=self.run.device)

    def _samples(self) -> list[dict]:
        run, eos_id = self.run, self.run.tokenizer.eos_id
        if isinstance(run.data, CompletionData):
            return show_samples(run, held_out(run.data, self.eval_blocks))
        if eos_id is None:
            return []
        start = Prompt("", [eos_id], {}, "the end-of-text token")
        drawn = draw(run, [start], sampling=run.sampling, group_size=NUM_SHOWN, seed=run.settings.seed)
        return drawn.rows()
