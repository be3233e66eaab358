"""A loss on pairs of completions, with the metrics that TRL gives it; rows 2i are chosen, rows 2i + 1 rejected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlft.algos.parts import Part, composed, function_of
from rlft.core.errors import ConfigError
from rlft.core.metrics import Metrics

ROWS_PER_PAIR = 2
TENSORS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths")


def uses_reference(function: Callable[..., Any]) -> bool:
    """Whether a loss on pairs compares the policy with a reference."""
    return "ref_chosen" in _part(function).names


class PairLoss:
    """A function of `rlft.functional.preference` on pairs, called with those of `TENSORS` that it names, and `beta`.

    chosen and rejected are logprobs summed over each completion, ref_chosen and ref_rejected the reference's, lengths
    count tokens; all are [P]. A function that names ref_chosen needs a reference.
    """

    def __init__(self, function: Callable[..., Tensor], *, beta: float) -> None:
        self.part, self.beta = _part(function), beta
        self.needs_reference = "ref_chosen" in self.part.names

    def __call__(
        self,
        logprobs: Tensor,
        lengths: Tensor,
        ref_logprobs: Tensor | None,
        metrics: Metrics,
        *,
        prefix: str = "",
        is_counted: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each of P pairs from the sums over their 2P rows.

        The implicit rewards that are logged are beta (logprob - ref_logprob), and beta times the logprob per token for
        a loss without a reference, both as in TRL. A tie counts half in their accuracy, where TRL has 0.

        Arguments:
            logprobs, ref_logprobs: [2P], summed over each completion. lengths: [2P], its tokens.
            is_counted: [P] bool, the pairs that the metrics are of; None: all.
        """
        chosen, rejected = logprobs[0::2], logprobs[1::2]
        of_reference = (None, None) if ref_logprobs is None else (ref_logprobs[0::2], ref_logprobs[1::2])
        tensors = dict(zip(TENSORS, (chosen, rejected, *of_reference, lengths[0::2], lengths[1::2]), strict=True))
        baseline = ref_logprobs if self.needs_reference else None
        scores = logprobs / lengths if baseline is None else logprobs - baseline
        rewards = (self.beta * scores.detach())[0::2], (self.beta * scores.detach())[1::2]
        margins = rewards[0] - rewards[1]
        for name, values in (
            ("rewards/chosen", rewards[0]),
            ("rewards/rejected", rewards[1]),
            ("rewards/accuracies", wins(margins)),
            ("rewards/margins", margins),
            ("logps/chosen", chosen),
            ("logps/rejected", rejected),
        ):
            metrics.add(f"{prefix}{name}", values, is_counted)
        return self.part(**tensors, beta=self.beta)


def wins(margins: Tensor) -> Tensor:
    """Return 1 where a margin is above 0, 0 where it is below, and 1/2 at 0."""
    return (torch.sign(margins) + 1) / 2


def check_pair_loss(function: Callable[..., Any], *, beta: float, has_reference: bool) -> None:
    """Raise `ConfigError` for what is no loss on pairs, for a second beta, and for a reference that is missing."""
    name = function_of(function).__name__
    if isinstance(function, functools.partial) and "beta" in function.keywords:
        raise ConfigError("algo.loss.beta is set by algo.beta, which the logged rewards are scaled by as well")
    part = _part(function)
    if not {"chosen", "rejected", "beta"} <= part.names:
        raise ConfigError(
            f"algo.loss={name} is no loss on pairs: it must take chosen, rejected and beta, as "
            f"rlft.functional.preference.dpo does"
        )
    if not beta > 0:
        raise ConfigError(f"algo.beta={beta} must be above 0")
    if "ref_chosen" in part.names and not has_reference:
        raise ConfigError(
            f"algo.loss={name} compares the policy with a reference: set reference=initial, or take algo=simpo or "
            f"algo=orpo, which need none"
        )
    try:  # called once, so that a setting outside its range is refused here and not at the first batch
        part(**dict.fromkeys(TENSORS, torch.ones(1)), beta=beta)
    except ValueError as error:
        raise ConfigError(f"algo.loss: {error}") from error


def _part(function: Callable[..., Any]) -> Part:
    return composed(function, where="algo.loss", tensors=TENSORS, from_run=("beta",))
