"""Supervised language-model training on plain text, or on completions of prompts: the mean loss per token.

loss = -(1 / N) sum log pi(x_t | x_<t), N the tokens of the whole optimizer batch that count: of plain text all, behind
a prompt those of the completion, its end-of-text token included. Perplexity is the exponential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlft.algos.base import Algorithm, Evaluation
from rlft.algos.offline.examples import check_held_out, check_room, check_sizes, completion_rows, held_out, show_samples
from rlft.core.batch import Batch, Denominators, Rows
from rlft.core.errors import ConfigError
from rlft.core.metrics import Means
from rlft.core.ranges import Size
from rlft.data.completions import CompletionData
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.data.source import holds_out
from rlft.data.text import TextData
from rlft.functional.aggregation import token_mean
from rlft.models.base import CausalLM
from rlft.models.likelihood import EVAL_ROWS, mean_loss, perplexity, text_rows
from rlft.models.scorer import Scorer
from rlft.rollout.engine import Sampling, generate
from rlft.text.tokenizer import Tokenizer


class SFT(Algorithm):
    """Next-token training on blocks of text or on completions, evaluated by the perplexity of held-out ones.

    Arguments:
        data: blocks of plain text, or prompts with a completion each.
        rows_per_step: blocks or completions in an optimizer batch, over all ranks.
        eval_blocks: held-out blocks or completions that an evaluation reads; None for all of them.
        sampling: how the samples of an evaluation are drawn, from the end-of-text token on or behind held-out prompts.
    """

    reads = (Kind.TEXT, Kind.COMPLETIONS)
    objective = ("eval/loss", "min")

    def __init__(
        self,
        *,
        policy: CausalLM,
        tokenizer: Tokenizer,
        data: TextData | CompletionData,
        sampling: Sampling,
        rows_per_step: Size,
        eval_blocks: Size | None,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.check(
            has_reference=False, world_size=world_size, rows_per_step=rows_per_step, eval_blocks=eval_blocks
        )  # fmt: skip
        if isinstance(data, CompletionData):
            check_room(data, context_length=policy.context_length)
        elif data.block_size > policy.context_length:
            raise ConfigError(
                f"data.block_size={data.block_size} must be at most {policy.context_length}, the model's context"
            )
        self.policy, self.tokenizer, self.data, self.sampling = policy, tokenizer, data, sampling
        self.rows_per_step, self.eval_blocks, self.seed, self.device = rows_per_step, eval_blocks, seed, device
        self.rank, self.world_size = rank, world_size

    @staticmethod
    def check(*, has_reference: bool, world_size: int, **settings: Any) -> None:
        rows = settings["rows_per_step"]
        check_sizes(setting="algo.rows_per_step", per_step=rows, at_least=1, world_size=world_size)
        check_held_out(setting="algo.eval_blocks", count=settings["eval_blocks"])

    def collect(self, batch_index: int) -> Batch:
        drawn = self.data.batch(batch_index, size=self.rows_per_step, seed=self.seed)
        return Batch(self._rows(drawn[self.rank :: self.world_size]))

    def loss(self, scorer: Scorer, batch: Batch, totals: Denominators, means: Means, *, update: int) -> Tensor:
        scores = scorer(batch.rows)
        mask = batch.rows.completion_mask
        means.add("entropy", scores.entropy, mask)
        return token_mean(-scores.logprobs, mask, num_tokens=totals.num_tokens)

    def evaluate(self) -> Evaluation:
        loss = mean_loss(self.policy, map(self._rows, self._held_out()))
        return Evaluation({"eval/loss": loss, "eval/perplexity": perplexity(loss)}, self._samples())

    @property
    def is_evaluated(self) -> bool:
        return holds_out(self.data)

    def plan(self) -> list[tuple[str, str]]:
        counts = [(f"data: {name}", f"{count:,}") for name, count in self.data.counts.items()]
        if isinstance(self.data, CompletionData):
            return [("completions per step", f"{self.rows_per_step:,}"), *counts]
        block = self.data.block_size
        tokens = f"{self.rows_per_step} blocks x {block} = {self.rows_per_step * block:,}"
        return [("tokens per step", tokens), *counts]

    def _held_out(self) -> Sequence[Tensor | list[Example]]:
        """Return what an evaluation reads, in pieces of EVAL_ROWS."""
        if not isinstance(self.data, CompletionData):
            return self.data.validation(max_blocks=self.eval_blocks).split(EVAL_ROWS)
        examples = held_out(self.data, self.eval_blocks)
        return [examples[start : start + EVAL_ROWS] for start in range(0, len(examples), EVAL_ROWS)]

    def _rows(self, drawn: Tensor | list[Example]) -> Rows:
        if isinstance(drawn, Tensor):
            return text_rows(drawn.to(self.device))
        return completion_rows(drawn, device=self.device)

    def _samples(self) -> list[dict]:
        if isinstance(self.data, CompletionData):
            examples = held_out(self.data, self.eval_blocks)
            return show_samples(self.policy, self.tokenizer, examples, sampling=self.sampling, device=self.device)
        if self.tokenizer.eos_id is None:
            return []
        rollout = generate(
            self.policy, [[self.tokenizer.eos_id]], group_size=5, sampling=self.sampling,
            eos_id=self.tokenizer.eos_id, seed=self.seed, stream="eval", device=self.device,
        )  # fmt: skip
        texts = self.tokenizer.decode_batch(rollout.completions())
        return [{"prompt": "", "completion": text} for text in texts]
