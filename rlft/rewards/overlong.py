"""DAPO's soft overlong penalty (Yu et al., arXiv:2503.14476, eq. 13), for completions close to the longest allowed."""

from __future__ import annotations

from typing import Any

from rlft.core.errors import ConfigError


class Overlong:
    """`r = clip((max_tokens - buffer - n) / buffer, -1, 0)` for a completion of n tokens.

    It is 0 up to `max_tokens - buffer` and falls linearly to -1 at `max_tokens`. A generated end token counts.
    """

    def __init__(self, *, max_tokens: int, buffer: int) -> None:
        """Raises `ConfigError` unless 1 <= buffer <= max_tokens."""
        if not 1 <= buffer <= max_tokens:
            raise ConfigError(
                f"reward.overlong.buffer={buffer} must be between 1 and reward.overlong.max_tokens={max_tokens}"
            )
        self.max_tokens, self.buffer = max_tokens, buffer

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        start = self.max_tokens - self.buffer
        return [min(0.0, max(-1.0, (start - len(ids)) / self.buffer)) for ids in completion_ids]
