"""Repetition: a price for saying the same thing twice within one completion.

The formula is Open-R1's `get_repetition_penalty_reward` (1 - distinct n-grams / all n-grams, as a penalty), over words
and marks in place of words split at white space: case is folded and each punctuation mark is an item of its own, so
that "great Great GREAT" and "!!!!" do not pass for variety, whatever tokenizer the policy has.

As a hold against reward hacking it stops the loop of one phrase that scores well. It sees neither the same completion
given to every prompt nor a list of different praise words; those are held by a KL to the reference. Fewer than
n items have nothing to repeat and cost nothing, so put `length` beside it.
"""

from __future__ import annotations

import re
from typing import Any

from rlft.core.errors import ConfigError

ITEM = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")  # a word ("didn't" is one) or a mark


class Repetition:
    """`r = -(1 - distinct / N)` in (-1, 0], for N n-grams of words and marks, `distinct` of them different; 0 if N = 0.

    `-r` is the share of n-grams that the completion said before. A script without spaces between words counts a run of
    letters as one word.
    """

    def __init__(self, ngram: int = 2) -> None:
        """`ngram` is n, at least 1. n = 1 also counts "the … the", which good prose has; n = 2 or 3 leaves it alone."""
        if not isinstance(ngram, int) or isinstance(ngram, bool) or ngram < 1:
            raise ConfigError(f"reward.repetition.ngram={ngram!r} must be a whole number of words, at least 1")
        self.ngram = ngram

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: str) -> float:
        items = ITEM.findall(completion.casefold())
        ngrams = list(zip(*(items[offset:] for offset in range(self.ngram)), strict=False))
        repeated = len(ngrams) - len(set(ngrams))
        return -repeated / len(ngrams) if ngrams else 0.0
