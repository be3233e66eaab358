"""How strongly, where, and by which estimator a policy is held to its reference."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable

from torch import Tensor

from rlft.algos.parts import Stateful
from rlft.core.errors import ConfigError, nearest
from rlft.functional import kl as estimators

ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": estimators.k1,
    "k2": estimators.k2,
    "k3": estimators.k3,
}
EXACT = "exact"
PLACES = ("loss", "reward")


class Controller(Stateful, ABC):
    """What the coefficient does over a run; the default: nothing. `factor` multiplies `algo.kl.coef`."""

    factor: float = 1.0

    def observe(self, *, kl_completion: float, num_tokens: int, num_completions: int) -> None:
        """Take in a sampled batch, to set the coefficient of the next one.

        Its KL per completion (k1, nats), its completion tokens, and its completions.
        """

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class Fixed(Controller):
    """The coefficient stays what it is."""


class Adaptive(Controller):
    """Steers the KL per completion to a target (Ziegler et al., arXiv:1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);   coef <- coef (1 + e n / horizon),   n completions in the batch
    """

    def __init__(self, *, target: float, horizon: float) -> None:
        """`target` in nats a completion, `horizon` in completions; both above 0."""
        for name, value in (("target", target), ("horizon", horizon)):
            if not value > 0:
                raise ConfigError(f"algo.kl.controller.{name}={value} must be above 0")
        self.target, self.horizon = target, horizon

    def observe(self, *, kl_completion: float, num_tokens: int, num_completions: int) -> None:
        error = min(max(kl_completion / self.target - 1.0, -0.2), 0.2)
        self.factor *= 1.0 + error * num_completions / self.horizon

    def state_dict(self) -> dict:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict) -> None:
        self.factor = state["factor"]


class Annealed(Controller):
    """Raises the coefficient linearly from 0 to `algo.kl.coef` over the first `tokens` completion tokens."""

    def __init__(self, *, tokens: int) -> None:
        if tokens < 1:
            raise ConfigError(f"algo.kl.controller.tokens={tokens} must be at least 1")
        self.tokens, self.num_tokens, self.factor = tokens, 0, 0.0

    def observe(self, *, kl_completion: float, num_tokens: int, num_completions: int) -> None:
        self.num_tokens += num_tokens
        self.factor = min(1.0, self.num_tokens / self.tokens)

    def state_dict(self) -> dict:
        return {"num_tokens": self.num_tokens, "factor": self.factor}

    def load_state_dict(self, state: dict) -> None:
        self.num_tokens, self.factor = state["num_tokens"], state["factor"]


class KLPenalty(Stateful):
    """A KL penalty; `kl` in the metrics is this very estimator, and `kl_coef` the coefficient that was used.

    Arguments:
        estimator: k1, k2 or k3 (`rlft.functional.kl` tells what each one's value and gradient are), or exact: the KL of
            the whole next-token distributions, which costs one more head product a token.
        coef: nats to reward units; 0 only measures.
        where: "loss" adds coef * estimator to each token's loss; "reward" takes coef * estimator from each token's
            reward (Ouyang et al., arXiv:2203.02155, eq. 2), and so its sum from a completion's.
        controller: what the coefficient does over the run.
    """

    def __init__(self, estimator: str, coef: float, where: str, controller: Controller | None = None) -> None:
        allowed = (*ESTIMATORS, EXACT)
        if estimator not in allowed:
            raise ConfigError(
                f"algo.kl.estimator={estimator} is not one of {', '.join(allowed)}{nearest(estimator, allowed)}"
            )
        if where not in PLACES:
            raise ConfigError(f"algo.kl.where={where} is not one of {', '.join(PLACES)}{nearest(where, PLACES)}")
        if coef < 0:
            raise ConfigError(f"algo.kl.coef must be at least 0, got {coef}")
        if coef and estimator == "k1" and where == "loss":
            raise ConfigError(
                "algo.kl.estimator=k1 in the loss holds nothing: the expected gradient of k1 is zero. Use "
                "algo/kl=k3 (or k2) for the loss, or algo/kl=in_reward"
            )
        self.estimator, self.where, self.base_coef = estimator, where, coef
        self.controller = controller or Fixed()
        self.is_exact = estimator == EXACT

    def __call__(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Return the estimator's value at each token; the exact KL needs more than logprobs (`ReferenceScores`)."""
        return ESTIMATORS[self.estimator](logprobs, ref_logprobs)

    @property
    def coef(self) -> float:
        """The coefficient for the next batch."""
        return self.base_coef * self.controller.factor

    @property
    def is_in_loss(self) -> bool:
        return self.base_coef > 0 and self.where == "loss"

    @property
    def is_in_reward(self) -> bool:
        return self.base_coef > 0 and self.where == "reward"

    def state_dict(self) -> dict:
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.controller.load_state_dict(state["controller"])
