"""Supervised language-model training on plain text: the mean negative log-likelihood per token.

loss = -(1 / N) sum log pi(x_t | x_<t), N the tokens of the whole optimizer batch. Perplexity is its exponential.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlft.algos.base import Algorithm, Evaluation, Totals
from rlft.data.text import TextData
from rlft.functional.aggregation import token_mean
from rlft.models.base import CausalLM
from rlft.models.scorer import Rows, Scorer
from rlft.rollout.engine import Sampling, generate
from rlft.text.tokenizer import Tokenizer
from rlft.trainer.batch import Batch
from rlft.trainer.metrics import Means

EVAL_ROWS = 32  # blocks in one forward of an evaluation


class SFT(Algorithm):
    """Next-token training on blocks of text, evaluated by the perplexity of held-out blocks.

    Arguments:
        rows_per_step: blocks in an optimizer batch, over all ranks.
        eval_blocks: held-out blocks that an evaluation reads; None for all of them.
        sampling: how the samples of an evaluation are drawn, from the end-of-text token on.
    """

    objective = ("eval/loss", "min")

    def __init__(
        self,
        *,
        policy: CausalLM,
        tokenizer: Tokenizer,
        data: TextData,
        sampling: Sampling,
        rows_per_step: int,
        eval_blocks: int | None,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.policy, self.tokenizer, self.data, self.sampling = policy, tokenizer, data, sampling
        self.rows_per_step, self.eval_blocks, self.seed, self.device = rows_per_step, eval_blocks, seed, device
        self.rank, self.world_size = rank, world_size

    def collect(self, batch_index: int) -> Batch:
        blocks = self.data.batch(batch_index, size=self.rows_per_step, seed=self.seed)
        return Batch(_text_rows(blocks[self.rank :: self.world_size].to(self.device)))

    def loss(self, scorer: Scorer, batch: Batch, totals: Totals, means: Means, *, update: int) -> Tensor:
        scores = scorer(batch.rows)
        mask = batch.rows.completion_mask
        means.add("entropy", scores.entropy, mask)
        return token_mean(-scores.logprobs, mask, num_tokens=totals.num_tokens)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        scorer, total, count = Scorer(self.policy), 0.0, 0
        for blocks in self.data.validation(max_blocks=self.eval_blocks).split(EVAL_ROWS):
            scores = scorer(_text_rows(blocks.to(self.device)))
            total -= float(scores.logprobs.double().sum())
            count += scores.logprobs.numel()
        loss = total / count
        return Evaluation({"eval/loss": loss, "eval/perplexity": math.exp(loss)}, self._samples())

    def plan(self) -> list[tuple[str, str]]:
        block = self.data.block_size
        return [("tokens per step", f"{self.rows_per_step} blocks x {block} = {self.rows_per_step * block:,}")] + [
            (f"data: {name}", f"{count:,}") for name, count in self.data.counts.items()
        ]

    def _samples(self) -> list[dict]:
        if self.tokenizer.eos_id is None:
            return []
        rollout = generate(
            self.policy, [[self.tokenizer.eos_id]], group_size=5, sampling=self.sampling,
            eos_id=self.tokenizer.eos_id, seed=self.seed, stream="eval", device=self.device,
        )  # fmt: skip
        texts = self.tokenizer.decode_batch(rollout.completions())
        return [{"prompt": "", "completion": text} for text in texts]


def _text_rows(blocks: Tensor) -> Rows:
    """View blocks `[B, T + 1]` as B one-token prompts with T counted tokens each."""
    num_rows = torch.arange(len(blocks), device=blocks.device)
    targets = blocks[:, 1:]
    return Rows(blocks[:, :1], torch.ones_like(num_rows), num_rows, targets, torch.ones_like(targets, dtype=torch.bool))
