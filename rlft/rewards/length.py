"""Length: no penalty within a range of lengths, and a penalty for each token outside it.

Added to another reward, it prevents two degenerate policies. One stops right after a single word of praise: the score
of one such word is high, and a short completion has a small KL, which is summed over tokens. The other never stops,
because a score that sums over words grows with their number. The penalty is zero inside the range, so it does not
affect completions of a normal length. Outside it is linear, so a group whose completions are all too short still has a
gradient towards the range.
"""

from __future__ import annotations

from typing import Any

from rlft.core.errors import ConfigError


class Length:
    """For a completion of n tokens, `r = -slope * max(min_tokens - n, n - max_tokens, 0)`, at most 0.

    n is `len(completion_ids[i])`: a generated end token counts, padding does not.
    """

    def __init__(self, *, min_tokens: int = 0, max_tokens: int | None = None, slope: float = 0.05) -> None:
        """Arguments:

        min_tokens, max_tokens: the range in tokens, both included; a `max_tokens` of None means no upper bound.
        slope: reward lost for each token outside the range, above 0.

        Raises `ConfigError` for a range that is empty or unbounded, and for a slope that is not a positive number.
        """
        if not _is_count(min_tokens):
            raise ConfigError(f"reward.length.min_tokens={min_tokens!r} must be a whole number of tokens, 0 or more")
        if max_tokens is not None and (not _is_count(max_tokens) or max_tokens < min_tokens):
            raise ConfigError(
                f"reward.length.max_tokens={max_tokens!r} must be null (no upper end) or a whole number of tokens, at "
                f"least reward.length.min_tokens={min_tokens}"
            )
        if min_tokens == 0 and max_tokens is None:
            raise ConfigError(
                "reward.length with min_tokens=0 and max_tokens=null is 0 for every completion; set one of them"
            )
        if isinstance(slope, bool) or not isinstance(slope, (int, float)) or not 0 < slope < float("inf"):
            raise ConfigError(f"reward.length.slope={slope!r} must be a number above 0 (reward lost for each token)")
        self.min_tokens, self.max_tokens, self.slope = min_tokens, max_tokens, float(slope)

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [-self.slope * outside if (outside := self._outside(len(ids))) else 0.0 for ids in completion_ids]

    def _outside(self, n: int) -> int:
        """Return by how many tokens a completion of `n` tokens misses the range."""
        return max(self.min_tokens - n, 0 if self.max_tokens is None else n - self.max_tokens, 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
