"""Prompts cut from running text, with the tokens that follow in it, for rewards that compare with the next token."""

from __future__ import annotations

import numpy as np
import torch

from rlft.core.errors import ConfigError
from rlft.core.ranges import Size
from rlft.core.rng import generator
from rlft.data.kinds import Kind
from rlft.data.prompts import Prompt
from rlft.data.source import Source, holds_out
from rlft.data.text import TextData
from rlft.text.tokenizer import Tokenizer


class Contexts:
    """Prompts of at most `context` tokens of plain text; their column `target_ids` holds the next `horizon` tokens.

    The length of each prompt is drawn uniformly between `min_context` and `context`. With min_context=1 a policy learns
    at every position of its context, not only at the last ones. The prompts are cut from `TextData`'s blocks, so the
    prompts of a step are a function of (seed, step), and the validation blocks of `text` measure the policy as a
    language model.

    Args:
        source: where the texts come from.
        tokenizer: turns them into ids.
        context: the longest prompt, in tokens.
        horizon: the number of `target_ids`.
        block_size: inputs of the block that a prompt is cut from, in tokens, at least context + horizon - 1.
        min_context: the shortest prompt, in tokens; None: `context`.

    Raises:
        ConfigError: the lengths do not fit into a block.
    """

    kind = Kind.CONTEXTS

    def __init__(
        self,
        source: Source,
        *,
        tokenizer: Tokenizer,
        context: int,
        horizon: int,
        block_size: Size,
        min_context: int | None = None,
    ) -> None:
        self.tokenizer, self.text = tokenizer, TextData(source, tokenizer=tokenizer, block_size=block_size)
        if context < 1 or horizon < 1 or context + horizon > block_size + 1:
            raise ConfigError(
                f"data.context={context} and data.horizon={horizon} must be at least 1, and together at most "
                f"data.block_size + 1 = {block_size + 1}"
            )
        self.min_context = context if min_context is None else min_context
        if not 1 <= self.min_context <= context:
            raise ConfigError(f"data.min_context={min_context} must be between 1 and data.context={context}")
        self.context, self.horizon = context, horizon
        self._held_out: list[Prompt] | None = None

    def prompts(self, split: str) -> list[Prompt]:
        """Return the prompts of the validation blocks; there is no list for train, which is cut anew at each step."""
        if split != "validation" or not self.holds_out:
            return []
        if self._held_out is None:
            self._held_out = self._cut(self.text.validation(), generator(0, "held-out context"))
        return self._held_out

    def batch(self, step: int, *, size: int, seed: int) -> list[Prompt]:
        """Return the `size` prompts of a step: a function of its arguments only."""
        return self._cut(self.text.batch(step, size=size, seed=seed), generator(seed, "context", step))

    @property
    def source(self) -> Source:
        """Where the texts come from."""
        return self.text.source

    @property
    def holds_out(self) -> bool:
        """Whether the source was asked for a validation split."""
        return holds_out(self.text)

    @property
    def counts(self) -> dict[str, int]:
        return self.text.counts

    def _cut(self, blocks: torch.Tensor, draws: np.random.Generator) -> list[Prompt]:
        lengths = draws.integers(self.min_context, self.context, size=len(blocks), endpoint=True)
        rows = list(zip(blocks.tolist(), lengths.tolist(), strict=True))
        texts = self.tokenizer.decode_batch([row[:length] for row, length in rows])
        return [
            Prompt(text, row[:length], {"target_ids": row[length : length + self.horizon]}, f"block {i}")
            for i, (text, (row, length)) in enumerate(zip(texts, rows, strict=True))
        ]
