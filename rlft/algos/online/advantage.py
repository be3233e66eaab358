"""The two kinds of advantages, and which one a part is.

An advantage of completions goes from one reward for each completion to one advantage for each; an advantage of tokens
from a reward at each token to an advantage at each. A part says which it is by the type of its parameter `rewards`:
`rlft.functional.shapes.PerCompletion` or `PerToken`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rlft.algos.parts import Part, composed, function_of
from rlft.core.errors import ConfigError
from rlft.functional.shapes import PerCompletion, PerToken

WHERE = "algo/advantage"
FROM_RUN = ("group_size",)


@dataclass(frozen=True)
class CompletionAdvantage:
    """From the rewards of whole completions, [B] -> [B].

    A completion's reward is the weighted sum of its rewards, less the KL of its tokens where that is in the reward; nan
    where no reward counts it. A part may also name `greedy_rewards` [B], of the prompt's greedy completion, and the
    setting `group_size`.
    """

    TENSORS: ClassVar = ("rewards", "greedy_rewards")
    part: Part

    def __call__(self, rewards: Tensor, *, greedy_rewards: Tensor | None, group_size: int) -> Tensor:
        return self.part(rewards=rewards, greedy_rewards=greedy_rewards, group_size=group_size)


@dataclass(frozen=True)
class TokenAdvantage:
    """From the rewards of tokens, [B, T] -> [B, T]; with a critic also the targets of its values, [B, T].

    A completion's reward stands at its last token, a KL in the reward at each. A part may also name `mask` [B, T], true
    where a token counts, `values` [B, T] of the critic, and the setting `group_size`.
    """

    TENSORS: ClassVar = ("rewards", "mask", "values")
    part: Part

    def __call__(
        self, rewards: Tensor, *, mask: Tensor, values: Tensor | None, group_size: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.part(rewards=rewards, mask=mask, values=values, group_size=group_size)


def advantage_of(part: Callable[..., Any]) -> CompletionAdvantage | TokenAdvantage:
    """Return a part as the advantage that it is.

    Raises `ConfigError` where it does not say which, or asks for what there is not.
    """
    function: Any = function_of(part)
    name = getattr(function, "__name__", type(function).__name__)
    called = function if inspect.isfunction(function) else type(function).__call__
    try:
        hint = typing.get_type_hints(called, include_extras=True).get("rewards")
    except NameError as error:
        raise ConfigError(f"{WHERE}: {error}, which an annotation of {name} needs at run time") from error
    for shape, kind in ((PerCompletion, CompletionAdvantage), (PerToken, TokenAdvantage)):
        if hint == shape:
            return kind(composed(part, where=WHERE, tensors=kind.TENSORS, from_run=FROM_RUN))
    raise ConfigError(
        f"{WHERE}: {name} does not say what its rewards are: annotate its parameter rewards as "
        f"rlft.functional.shapes.PerCompletion ([B]) or PerToken ([B, T])"
    )
