"""A token-level reward for prompts cut from running text: is each sampled token the one that follows in the text?"""

from __future__ import annotations

from typing import Any

from rlft.core.errors import ConfigError


class NextToken:
    """`r_t = 1` where the t-th token of the completion is the t-th of `target_ids`, else `miss`; a token-level reward.

    `target_ids` is a column of the data (`rlft.data.contexts`). Tokens after the last target get 0.
    """

    def __init__(self, *, miss: float = 0.0) -> None:
        """`miss` is the reward of a wrong token, at most 0; usually 0 or -1."""
        if miss > 0:
            raise ConfigError(f"reward.next_token.miss={miss} must be at most 0: a wrong token is no success")
        self.miss = miss

    def __call__(
        self, completion_ids: list[list[int]], target_ids: list[list[int]] | None = None, **columns: Any
    ) -> list[list[float]]:
        if target_ids is None:
            raise ConfigError("reward=next_token needs a column target_ids: data=contexts has one")
        return [
            [1.0 if token == target else self.miss for token, target in zip(ids, targets, strict=False)]
            + [0.0] * (len(ids) - len(targets))
            for ids, targets in zip(completion_ids, target_ids, strict=True)
        ]
