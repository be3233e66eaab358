"""How strongly, where, and by which estimator a policy is held to its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlft.errors import ConfigError
from rlft.functional import kl as estimators

ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": estimators.k1,
    "k2": estimators.k2,
    "k3": estimators.k3,
}
PLACES = ("loss", "reward")


@dataclass(frozen=True)
class KLPenalty:
    """A KL penalty with a fixed coefficient; `kl` in the metrics is this very estimator.

    Arguments:
        estimator: k1, k2 or k3 (`rlft.functional.kl` tells what each one's value and gradient are).
        coef: nats to reward units; 0 only measures.
        where: "loss" adds coef * estimator to each token's loss; "reward" takes coef * its sum over the completion
            from the completion's reward (Ouyang et al., arXiv:2203.02155, eq. 2).
    """

    estimator: str
    coef: float
    where: str

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"algo.kl.estimator={self.estimator} is not one of {', '.join(ESTIMATORS)}")
        if self.where not in PLACES:
            raise ConfigError(f"algo.kl.where={self.where} is not one of {', '.join(PLACES)}")
        if self.coef < 0:
            raise ConfigError(f"algo.kl.coef must be at least 0, got {self.coef}")
        if self.coef and self.estimator == "k1" and self.where == "loss":
            raise ConfigError(
                "algo.kl.estimator=k1 in the loss holds nothing: the expected gradient of k1 is zero. Use "
                "algo/kl=k3 (or k2) for the loss, or algo/kl=in_reward"
            )

    def __call__(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return ESTIMATORS[self.estimator](logprobs, ref_logprobs)

    @property
    def is_in_loss(self) -> bool:
        return self.coef > 0 and self.where == "loss"

    @property
    def is_in_reward(self) -> bool:
        return self.coef > 0 and self.where == "reward"
