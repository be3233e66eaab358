"""A verifier for data with one right answer: whether the completion is it, or how much of it stands at its place."""

from __future__ import annotations

from typing import Any

from rlft.core.errors import ConfigError, RewardError, nearest

MODES = ("exact", "fraction", "characters")


class Answer:
    """How right a completion is.

    `exact`: 1 where the completion, white space aside, is the `answer` column, else 0. `fraction`: the share of
    places, of the longer of the two, at which both have the same character. `characters`: a token-level reward for
    tokenizers of characters, 1 / (len(answer) + 1) at each token that is the answer's character at its place, and at
    the end-of-text token behind the whole answer's length.
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
            raise ConfigError("reward=answer needs data with a column 'answer', such as data=prompts data/source=sums")
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
    """Return a value for each token; the last one is the end of the text where it is no character."""
    if not len(text) <= num_tokens <= len(text) + 1:
        raise RewardError(f"{text!r} has {len(text)} characters in {num_tokens} tokens: this needs a token for each")
    is_right = [i < len(answer) and text[i] == answer[i] for i in range(len(text))]
    if num_tokens > len(text):
        is_right.append(len(text) == len(answer))
    return [right / (len(answer) + 1) for right in is_right]
