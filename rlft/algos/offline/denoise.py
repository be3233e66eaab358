"""Masked diffusion on plain text: hide a random share of a block's tokens and predict them from all the others.

    loss = (1 / N) sum_blocks (1 / t) sum_hidden -log pi(x_i | what is shown),  t ~ U(0, 1] a block, hidden with prob. t

N counts all tokens of the whole optimizer batch, hidden or not. The mean over t and masks is an upper bound on the
negative log-likelihood per token, in nats (Sahoo et al., MDLM, arXiv:2406.07524, with the schedule alpha = 1 - t; Nie
et al., LLaDA, arXiv:2502.09992, section 2). It is the mean over all orders of writing the block one token at a time of
the negative log-likelihood in that order (Ou et al., arXiv:2406.03736). As in MDLM [MASK] has no probability; as in
LLaDA the model is not told t.

A block's first token is given and never hidden, so that the bound is on what `algo=sft` measures on the same blocks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlft.algos.base import NOT_EVALUATED, Algorithm, Evaluation, Run, Setup, check_shared
from rlft.algos.samples import EVAL_SEED, EVAL_STREAM, NUM_SHOWN
from rlft.core.batch import Batch, Denominators
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics
from rlft.core.ranges import Size
from rlft.data.kinds import Kind
from rlft.data.text import TextData
from rlft.functional.aggregation import token_mean
from rlft.models.base import CausalLM
from rlft.models.likelihood import EVAL_ROWS, text_rows
from rlft.models.scorer import Scorer, Scores
from rlft.rollout.sampling import uniforms
from rlft.rollout.unmask import Unmasking, unmask


class Denoise(Algorithm):
    """Masked-diffusion training of a bidirectional policy, evaluated by the bound on held-out blocks.

    Arguments:
        rows_per_step: blocks in an optimizer batch, over all ranks. Block r of them has t in
            (1 - (r + 1) / rows_per_step, 1 - r / rows_per_step]: stratified, to lower the variance (MDLM's
            low-discrepancy sampler). Blocks come in random order, so that each t is as likely for any block.
        eval_blocks: held-out blocks that an evaluation reads; None for all of them.
        eval_levels: masks of each held-out block.
        sample_rounds, sample_order: how the samples of an evaluation are filled in (`rlft/rollout/unmask.py`).
            Each sample is a whole block behind a held-out block's first token, of which the first `max_new_tokens` are
            shown, up to the end of the text; the root setting `temperature` is theirs.

    Raises `ConfigError` for a causal policy, and for blocks longer than the context.
    """

    reads = (Kind.TEXT,)
    objective = ("eval/loss", "min")

    def __init__(
        self,
        run: Run,
        *,
        rows_per_step: Size,
        eval_blocks: Size | None,
        eval_levels: Size,
        sample_rounds: Size,
        sample_order: str,
    ) -> None:
        super().__init__(run)
        self.mask_id = _checked_mask_id(run.policy, run.data)
        self.unmasking = Unmasking(sample_rounds, sample_order, run.settings.temperature)
        self.rows_per_step, self.eval_blocks, self.eval_levels = rows_per_step, eval_blocks, eval_levels

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        Unmasking(settings["sample_rounds"], settings["sample_order"])
        check_shared("algo.rows_per_step", settings["rows_per_step"], setup)

    def collect(self, batch_index: int) -> Batch:
        blocks = self.run.data.batch(batch_index, size=self.rows_per_step, seed=self.run.settings.seed)
        mine = torch.arange(self.run.rank, self.rows_per_step, self.run.world_size)
        draws = self._draws(
            mine, self.run.data.block_size + 1, seed=self.run.settings.seed, stream="noise", step=batch_index
        )
        level = (self.rows_per_step - mine - draws[:, 0]) / self.rows_per_step  # t, never rounded to 0
        return self._noised(blocks[mine], draws[:, 1:] < level[:, None], weight=1 / level)

    def loss(
        self, scorer: Scorer, batch: Batch, denominators: Denominators, metrics: Metrics, *, update: int
    ) -> Tensor:
        terms, scores = self._terms(scorer, batch)
        metrics.add("entropy", scores.entropy, batch.values["noised_ids"] == self.mask_id)
        return token_mean(terms, batch.rows.completion_mask, num_tokens=denominators.num_tokens)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Estimate the bound without bias from `eval_levels` masks of each block, stratified by what they hide.

        With t integrated out, the number of hidden tokens is uniform on 1 .. T and a mask with n of them weighs T / n,
        which varies much less than 1 / t (LLaDA, section 2.4).
        """
        scorer, total = Scorer(self.run.policy), 0.0
        blocks, size = self.run.data.validation(max_blocks=self.eval_blocks), self.run.data.block_size
        for rows in torch.arange(len(blocks)).split(EVAL_ROWS):
            for k in range(self.eval_levels):
                draws = self._draws(rows, size + 1, seed=EVAL_SEED, stream="eval noise", step=k)
                num_hidden = ((k + 1 - draws[:, 0]) * size / self.eval_levels).ceil()  # [B], 1 .. T
                hidden = draws[:, 1:].argsort(dim=1).argsort(dim=1) < num_hidden[:, None]
                terms, _ = self._terms(scorer, self._noised(blocks[rows], hidden, weight=size / num_hidden))
                total += float(terms.sum())
        loss = total / (self.eval_levels * len(blocks) * size)
        return Evaluation({"eval/loss": loss, "eval/perplexity_bound": math.exp(loss)}, self._samples())

    def plan(self) -> list[tuple[str, str]]:
        block = self.run.data.block_size
        return [
            ("tokens per step", f"{self.rows_per_step} blocks x {block} = {self.rows_per_step * block:,}"),
            ("held-out bound", f"{self.eval_levels} masks of each block" if self.is_evaluated else NOT_EVALUATED),
            *self.run.data_plan,
        ]

    def _terms(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Scores]:
        """Return weight * -log pi at the hidden tokens and 0 elsewhere, `[B, T]`, and the scores that they are from."""
        noised_ids = batch.values["noised_ids"]
        rows = replace(batch.rows, completion_mask=noised_ids == self.mask_id)
        scores = scorer(rows, noised_ids=noised_ids)
        return -scores.logprobs * batch.values["weight"][:, None], scores

    def _noised(self, blocks: Tensor, hidden: Tensor, *, weight: Tensor) -> Batch:
        """View blocks `[B, T + 1]` as one-token prompts with T counted tokens, of which some `[B, T]` are hidden."""
        rows = text_rows(blocks.to(self.run.device))
        noised_ids = torch.where(hidden.to(self.run.device), self.mask_id, rows.completion_ids)
        return Batch(rows, {"noised_ids": noised_ids, "weight": weight.to(self.run.device)})

    def _draws(self, rows: Tensor, count: int, *, seed: int, stream: str, step: int) -> Tensor:
        """Return uniforms in [0, 1), float64 `[B, count]`: each a function of (seed, stream, step, row, place)."""
        numbers = rows.tolist()
        members = [0] * len(numbers)
        made = uniforms(seed=seed, stream=stream, step=step, prompts=numbers, members=members, num_tokens=count)
        return torch.from_numpy(made)

    def _samples(self) -> list[dict]:
        blocks = self.run.data.validation(max_blocks=NUM_SHOWN).to(self.run.device)
        canvas = torch.cat([blocks[:, :1], torch.full_like(blocks[:, 1:], self.mask_id)], dim=1)
        filled = unmask(self.run.policy, canvas, how=self.unmasking, seed=EVAL_SEED, stream=EVAL_STREAM).tolist()
        return [
            {
                "prompt": self.run.tokenizer.decode(ids[:1]),
                "completion": self.run.tokenizer.decode(self._shown(ids[1:])),
            }
            for ids in filled
        ]

    def _shown(self, ids: list[int]) -> list[int]:
        end = ids.index(self.run.tokenizer.eos_id) if self.run.tokenizer.eos_id in ids else len(ids)
        return ids[: min(end, self.run.settings.max_new_tokens)]


def _checked_mask_id(policy: CausalLM, data: TextData) -> int:
    if policy.mask_id is None:
        raise ConfigError(
            "algo=denoise needs a model that attends both ways: model=gpt2_scratch model.is_causal=false "
            "(+experiment=denoise_small)"
        )
    if policy.context_length < data.block_size + 1:
        raise ConfigError(
            f"data.block_size={data.block_size}: a block's {data.block_size + 1} tokens are read at once, and the "
            f"model has {policy.context_length} positions; data.block_size={policy.context_length - 1} fits"
        )
    return policy.mask_id
