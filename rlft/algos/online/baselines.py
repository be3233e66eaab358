"""Advantages that remember: a running mean of the returns as REINFORCE's baseline."""

from __future__ import annotations

from torch import Tensor

from rlft.algos.parts import Stateful
from rlft.core.errors import ConfigError
from rlft.core.ranges import Fraction
from rlft.functional.advantages import discounted_returns
from rlft.functional.masking import zero_outside
from rlft.functional.shapes import PerToken


class RunningBaseline(Stateful):
    """`A_t = R_t - b`, with b a running mean of earlier batches' returns (Williams, 1992, section 4; Sutton & Barto,
    section 13.4).

    b is from batches that came before, so that the gradient is unbiased; it is 0 at the first.
    """

    def __init__(self, *, gamma: Fraction = 1.0, decay: float | None = 0.9) -> None:
        """`gamma` discounts the returns. `decay` weighs the past: b <- decay b + (1 - decay) mean(R); None for the
        plain mean over all batches so far."""
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ConfigError(f"algo.advantage.decay={decay} must be in [0, 1), or null for the mean over all batches")
        self.gamma, self.decay = gamma, decay
        self.mean, self.num_batches = 0.0, 0

    def __call__(self, rewards: PerToken, mask: PerToken) -> Tensor:
        """Return `[B, T]` from token rewards `[B, T]`, and count this batch in."""
        returns = discounted_returns(rewards, mask, gamma=self.gamma)
        advantages = zero_outside(returns - self.mean, mask)
        batch_mean = float(returns.sum() / mask.sum().clamp(min=1))
        self.num_batches += 1
        if self.num_batches == 1:
            self.mean = batch_mean
        else:
            weight = 1.0 / self.num_batches if self.decay is None else 1.0 - self.decay
            self.mean += weight * (batch_mean - self.mean)
        return advantages

    def state_dict(self) -> dict:
        return {"mean": self.mean, "num_batches": self.num_batches}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.num_batches = state["mean"], state["num_batches"]
