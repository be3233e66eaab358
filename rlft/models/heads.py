"""Heads that are trained beside a policy: value functions, on its trunk or on their own, and scores of texts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

from torch import Tensor, nn

from rlft.core.batch import Rows
from rlft.core.ranges import NonNegative
from rlft.models.base import CausalLM
from rlft.models.rows import predictors


class Head(nn.Module, ABC):
    """One number (or K numbers) for each counted completion token, from the hidden state that predicts it."""

    lr_scale: float  # its learning rate as a multiple of the policy's

    @abstractmethod
    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Return `[N]` (or `[N, K]`) for the N counted tokens, which the policy predicts from `hidden` `[N, C]`."""


class ValueHead(Head):
    """A linear map of the policy's own hidden state, whose loss also trains the shared trunk.

    It starts at zero: the first advantages are returns, and the first value loss does not move the trunk.
    """

    def __init__(self, policy: CausalLM, *, lr_scale: NonNegative = 1.0) -> None:
        super().__init__()
        self.linear, self.lr_scale = _zero_linear(policy), lr_scale

    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        return self.linear(hidden)[:, 0]


class Critic(Head):
    """A model of its own with a linear head. It starts as a copy of the policy, which its loss does not move."""

    def __init__(self, policy: CausalLM, *, lr_scale: NonNegative = 1.0) -> None:
        super().__init__()
        self.trunk, self.linear, self.lr_scale = copy.deepcopy(policy), _zero_linear(policy), lr_scale

    def forward(self, hidden: Tensor | None, rows: Rows) -> Tensor:
        return self.linear(predictors(self.trunk, rows))[:, 0]


class ScoreHead(Head):
    """A linear map of the policy's own hidden state to `num_outputs` numbers: a reward, or the logits of classes.

    It starts at zero: every reward is 0, and all classes are equally likely.
    """

    def __init__(self, policy: CausalLM, *, num_outputs: int = 1, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.lr_scale = _zero_linear(policy, num_outputs), lr_scale

    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        return self.linear(hidden)


def _zero_linear(policy: CausalLM, num_outputs: int = 1) -> nn.Linear:
    weight = policy.head_weight
    linear = nn.Linear(weight.shape[1], num_outputs, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
