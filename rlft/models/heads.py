"""Scalar heads that are trained beside a policy: value functions on the policy's trunk or on one of their own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

from torch import Tensor, nn

from rlft.models.base import CausalLM
from rlft.models.scorer import Rows, predictors


class Head(nn.Module, ABC):
    """One number for each counted completion token, from the state that predicts it."""

    lr_scale: float  # its learning rate, as a multiple of the policy's

    @abstractmethod
    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Return `[N]` for the N counted tokens, whose predicting states of the policy are `hidden` `[N, C]`."""


class ValueHead(Head):
    """A linear map of the policy's own hidden state: its loss trains the shared trunk too.

    It starts at zero, so that the first advantages are returns and the first value loss moves the trunk by nothing.
    """

    def __init__(self, policy: CausalLM, *, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.lr_scale = _zero_linear(policy), lr_scale

    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        return self.linear(hidden)[:, 0]


class Critic(Head):
    """A model of its own with a linear head, begun as a copy of the policy: its loss does not touch the policy."""

    def __init__(self, policy: CausalLM, *, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.trunk, self.linear, self.lr_scale = copy.deepcopy(policy), _zero_linear(policy), lr_scale

    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        return self.linear(predictors(self.trunk, rows)[rows.completion_mask])[:, 0]


def _zero_linear(policy: CausalLM) -> nn.Linear:
    weight = policy.head_weight
    linear = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
