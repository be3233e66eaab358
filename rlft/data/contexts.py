"""Contexts from running text as prompts, with the tokens that really follow: for rewards that read the next token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlft.data.prompts import Prompt
from rlft.data.source import Source
from rlft.data.text import TextData
from rlft.errors import ConfigError
from rlft.text.tokenizer import Tokenizer


class Contexts:
    """Prompts of `context` tokens cut from plain text; column `target_ids` holds the `horizon` tokens that follow.

    The blocks are `TextData`'s, so the prompts of a step are a function of (seed, step), and the validation blocks of
    `text` measure the policy as a language model.
    """

    def __init__(self, text: Callable[..., TextData], *, tokenizer: Tokenizer, context: int, horizon: int) -> None:
        """`text` makes the blocks, given a tokenizer; `context` and `horizon`, in tokens, must fit into one.

        Raises `ConfigError` where they do not.
        """
        self.tokenizer, self.text = tokenizer, text(tokenizer=tokenizer)
        if context < 1 or horizon < 1 or context + horizon > self.text.block_size + 1:
            raise ConfigError(
                f"data.context={context} and data.horizon={horizon} must be at least 1, and together at most "
                f"data.text.block_size + 1 = {self.text.block_size + 1}"
            )
        self.context, self.horizon = context, horizon
        self._held_out: list[Prompt] | None = None

    def prompts(self, split: str) -> list[Prompt]:
        """Return the contexts of the validation blocks; a training split has a new context at each step."""
        if split != "validation":
            return []
        if self._held_out is None:
            self._held_out = self._cut(self.text.validation())
        return self._held_out

    def batch(self, step: int, *, size: int, seed: int) -> list[Prompt]:
        """Return the `size` prompts of a step: a function of its arguments only."""
        return self._cut(self.text.batch(step, size=size, seed=seed))

    @property
    def source(self) -> Source:
        """Where the texts come from, as in `PromptData`."""
        return self.text.source

    @property
    def counts(self) -> dict[str, int]:
        return self.text.counts

    def _cut(self, blocks: torch.Tensor) -> list[Prompt]:
        end = self.context + self.horizon
        ids = blocks[:, :end].tolist()
        texts = self.tokenizer.decode_batch([row[: self.context] for row in ids])
        return [
            Prompt(text, row[: self.context], {"target_ids": row[self.context :]}, f"block {i}")
            for i, (text, row) in enumerate(zip(texts, ids, strict=True))
        ]
