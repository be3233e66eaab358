"""torch's AdamW without torch's compiler.

torch wraps an optimizer's methods so that torch.compile leaves them alone, and the wrappers import the compiler at
their first call. That would take more than a second of every start, and nothing here uses it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch

_Base = torch.optim.AdamW
_inner = cast(Callable[..., Any], inspect.unwrap)


class AdamW(_Base):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101); computes the same as torch.optim.AdamW."""

    add_param_group = _inner(_Base.add_param_group)
    load_state_dict = _inner(_Base.load_state_dict)
    state_dict = _inner(_Base.state_dict)
    zero_grad = _inner(_Base.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        return _inner(_Base.step)(self, closure)
