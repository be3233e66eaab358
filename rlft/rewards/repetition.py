"""Repetition: a penalty for repeated n-grams within one completion.

The formula is Open-R1's `get_repetition_penalty_reward` (1 - distinct n-grams / all n-grams, as a penalty). Open-R1
splits words at white space. Here the n-grams are of words and punctuation marks, and case is folded, so that "great
Great GREAT" and "!!!!" count as repetition with every tokenizer.

It keeps a policy from hacking a reward by repeating one phrase that scores well. It notices neither the same completion
for every prompt nor a list of different words of praise; a KL to the reference prevents those. A completion of fewer
than n words and marks has no n-gram and costs nothing, so combine this reward with `length`.
"""

from __future__ import annotations

import re
from typing import Any

from rlft.core.errors import ConfigError

ITEM = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")  # a word ("didn't" is one) or a mark


class Repetition:
    """`r = -(1 - distinct / N)` in (-1, 0], for N n-grams of words and marks, `distinct` of them different; 0 if N = 0.

    `-r` is the fraction of n-grams that occurred earlier in the completion. In a script without spaces between words, a
    run of letters counts as one word.
    """

    def __init__(self, ngram: int = 2) -> None:
        """`ngram` is n, at least 1. n = 1 also penalises "the … the", which good prose has; n = 2 or 3 does not."""
        if not isinstance(ngram, int) or isinstance(ngram, bool) or ngram < 1:
            raise ConfigError(f"reward.repetition.ngram={ngram!r} must be a whole number of words, at least 1")
        self.ngram = ngram

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: str) -> float:
        items = ITEM.findall(completion.casefold())
        ngrams = list(zip(*(items[offset:] for offset in range(self.ngram)), strict=False))
        repeated = len(ngrams) - len(set(ngrams))
        return -repeated / len(ngrams) if ngrams else 0.0
