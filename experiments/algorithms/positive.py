"""BNPO's reward: 1 where VADER calls the completion positive (compound from 0.05 on), else 0."""

from __future__ import annotations

from typing import Any

from rlft.rewards.sentiment import Sentiment

_sentiment = Sentiment(scale="binary")


def positive(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list:
    return _sentiment(prompts, completions, completion_ids)
