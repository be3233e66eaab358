"""A verifier for data with one right answer: whether the completion is it, or how much of it stands at its place."""

from __future__ import annotations

from typing import Any

from rlft.errors import ConfigError, RewardError, nearest

MODES = ("exact", "fraction", "characters")


class Answer:
    """How right a completion is.

    `exact`: 1 where the completion, white space aside, is the `answer` column, else 0. `fraction`: the share of
    places, of the longer of the two, at which both have the same character. `characters`: a token-level reward for
    tokenizers of characters, 1 / len(answer) at each token that is the answer's character at its place.
    """

    def __init__(self, *, mode: str = "exact") -> None:
        """Raises `ConfigError` for an unknown mode."""
        if mode not in MODES:
            raise ConfigError(f"reward.answer.mode={mode} is not one of {', '.join(MODES)}{nearest(mode, MODES)}")
        self.mode = mode

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        answer: list[Any] | None = None,
        **columns: Any,
    ) -> list[float] | list[list[float]]:
        if answer is None:
            raise ConfigError("reward=answer needs data with a column 'answer', such as data=sums")
        if self.mode == "characters":
            texts = zip(completions, completion_ids, answer, strict=True)
            return [_characters(text, len(ids), str(wanted)) for text, ids, wanted in texts]
        pairs = [(given.strip(), str(wanted).strip()) for given, wanted in zip(completions, answer, strict=True)]
        if self.mode == "exact":
            return [float(given == wanted) for given, wanted in pairs]
        return [
            sum(x == y for x, y in zip(given, wanted, strict=False)) / max(len(given), len(wanted), 1)
            for given, wanted in pairs
        ]


def _characters(text: str, num_tokens: int, answer: str) -> list[float]:
    """Return a value for each token; one that is no character (the end of the text) gets 0."""
    if len(text) > num_tokens:
        raise RewardError(f"{text!r} has {len(text)} characters in {num_tokens} tokens: this needs a token for each")
    values = [float(x == y) / len(answer) for x, y in zip(text, answer, strict=False)]
    return values + [0.0] * (num_tokens - len(values))
