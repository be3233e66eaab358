"""Sentiment by VADER's lexicon and rules (Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM 2014).

VADER scores words, not grammar, so a policy can hack it: the compound is s / sqrt(s^2 + 15), where s is the sum of the
words' valences, and any pile of words of praise scores near 1. A KL to the reference, `repetition` and `length` prevent
this.
"""

from __future__ import annotations

import importlib
from typing import Any

from rlft.core.errors import ConfigError, nearest

TARGETS = ("positive", "negative")
SCALES = ("graded", "binary")
THRESHOLD = 0.05  # VADER's own: a text is positive at a compound of at least 0.05, and negative at one of at most -0.05


class Sentiment:
    """VADER's compound score c in [-1, 1] of the completion, without its prompt.

    | target   | graded | binary                        |
    |----------|--------|-------------------------------|
    | positive | c      | 1 if c >= 0.05, else 0        |
    | negative | -c     | 1 if c <= -0.05, else 0       |

    An empty completion has c = 0.
    """

    def __init__(self, target: str = "positive", *, scale: str = "graded") -> None:
        """Raises `ConfigError` for an unknown `target` or `scale`, and if vaderSentiment is not installed."""
        if target not in TARGETS:
            raise ConfigError(
                f"reward.sentiment.target={target!r} must be one of {', '.join(TARGETS)}{nearest(str(target), TARGETS)}"
            )
        if scale not in SCALES:
            raise ConfigError(
                f"reward.sentiment.scale={scale!r} must be one of {', '.join(SCALES)}{nearest(str(scale), SCALES)}"
            )
        try:
            vader = importlib.import_module("vaderSentiment.vaderSentiment")
        except ImportError as error:
            raise ConfigError(
                "reward=sentiment needs the package vaderSentiment: pip install 'rlft[sentiment]'"
            ) from error
        self.sign = 1.0 if target == "positive" else -1.0
        self.scale = scale
        self.analyzer = vader.SentimentIntensityAnalyzer()  # made once, because it reads the lexicon

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: str) -> float:
        signed = self.sign * self.analyzer.polarity_scores(completion)["compound"] + 0.0  # + 0.0 avoids -0.0
        if self.scale == "graded":
            return signed
        return float(signed >= THRESHOLD)
