"""A verifier for data with one right answer: is the completion that answer, or how many of its characters are right?"""

from __future__ import annotations

from typing import Any

from rlft.core.errors import ConfigError, RewardError, check_choice

MODES = ("exact", "fraction", "characters")


class Answer:
    """Compares a completion with the column `answer`.

    `exact`: 1 if they are equal apart from white space at the ends, else 0. `fraction`: the number of positions at
    which both have the same character, divided by the length of the longer one. `characters`: a token-level reward for
    character tokenizers, 1 / (len(answer) + 1) for each token that is the answer's character at its position, and for
    an end-of-text token if the completion is as long as the answer.
    """

    def __init__(self, *, mode: str = "exact") -> None:
        """Raises `ConfigError` for an unknown mode."""
        check_choice("reward.answer.mode", mode, MODES)
        self.mode = mode

    def __call__(
        self,
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
    """Return a value for each token; a token more than there are characters is the end-of-text token."""
    if not len(text) <= num_tokens <= len(text) + 1:
        raise RewardError(f"{text!r} has {len(text)} characters in {num_tokens} tokens: this needs a token for each")
    is_right = [i < len(answer) and text[i] == answer[i] for i in range(len(text))]
    if num_tokens > len(text):
        is_right.append(len(text) == len(answer))
    return [right / (len(answer) + 1) for right in is_right]
