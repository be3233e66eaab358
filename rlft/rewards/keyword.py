"""Keywords: the share of a list of words that a completion uses."""

from __future__ import annotations

import re
from typing import Any

from rlft.core.errors import ConfigError


class Keyword:
    """`r = (number of distinct keywords that occur in the completion) / (number of keywords)`, in [0, 1].

    A repeated keyword counts once, so repetition earns nothing. With a negative weight, keywords are words to avoid.
    """

    def __init__(self, keywords: list[str], *, case_sensitive: bool = False, whole_words: bool = True) -> None:
        """Arguments:

        keywords: words or phrases, all different.
        case_sensitive: whether "Film" and "film" differ.
        whole_words: whether "art" must stand alone, so that "party" does not count.

        Raises `ConfigError` for an empty list, and for a keyword that is empty, repeated or not a string.
        """
        if not isinstance(keywords, (list, tuple)) or not keywords:
            raise _refused(
                keywords, "must be a list of at least one word, such as reward.keyword.keywords=[great,moving]"
            )
        for keyword in keywords:
            if not isinstance(keyword, str) or not keyword.strip():
                raise _refused(
                    keywords, f"holds {keyword!r}, which is not a word; quote what YAML reads as another type, \"'no'\""
                )
        folded = [keyword if case_sensitive else keyword.casefold() for keyword in keywords]
        if len(set(folded)) < len(folded):
            raise _refused(
                keywords, "names a keyword twice; name each once (case counts only with case_sensitive=true)"
            )
        flags = 0 if case_sensitive else re.IGNORECASE
        self._patterns = [
            re.compile(_bounded(keyword) if whole_words else re.escape(keyword), flags) for keyword in keywords
        ]

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        return [
            sum(pattern.search(completion) is not None for pattern in self._patterns) / len(self._patterns)
            for completion in completions
        ]


def _bounded(keyword: str) -> str:
    """Return a pattern for `keyword` with no letter, digit or underscore right before or after it."""
    return rf"(?<!\w){re.escape(keyword)}(?!\w)"


def _refused(keywords: Any, why: str) -> ConfigError:
    return ConfigError(f"reward.keyword.keywords={keywords!r} {why}")
