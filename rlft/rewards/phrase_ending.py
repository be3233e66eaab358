"""The ending: does a completion end with one of the given phrases or punctuation marks?"""

from __future__ import annotations

import re
from typing import Any

from rlft.core.errors import ConfigError


class PhraseEnding:
    """`r = 1` if the completion ends with one of `phrases`, else `0`; white space at the end is ignored.

    A phrase that begins with a letter or digit must begin a word: "weekend" does not end with "end".
    """

    def __init__(self, phrases: list[str], *, case_sensitive: bool = False) -> None:
        """Arguments:

        phrases: the endings; [".", "!", "?"] asks for a finished sentence.
        case_sensitive: whether "The End" and "the end" differ.

        Raises `ConfigError` for an empty list, and for a phrase that is empty or not a string.
        """
        if not isinstance(phrases, (list, tuple)) or not phrases:
            raise _refused(
                phrases, "must be a list of at least one ending, such as reward.phrase_ending.phrases=['the end']"
            )
        for phrase in phrases:
            if not isinstance(phrase, str) or not phrase.strip():
                raise _refused(
                    phrases, f"holds {phrase!r}, which is no text; quote what YAML reads as another type, \"'no'\""
                )
        endings = [
            (r"(?<!\w)" if re.match(r"\w", phrase.strip()) else "") + re.escape(phrase.strip()) for phrase in phrases
        ]
        self._pattern = re.compile(rf"(?:{'|'.join(endings)})\s*\Z", 0 if case_sensitive else re.IGNORECASE)

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        return [float(self._pattern.search(completion) is not None) for completion in completions]


def _refused(phrases: Any, why: str) -> ConfigError:
    return ConfigError(f"reward.phrase_ending.phrases={phrases!r} {why}")
