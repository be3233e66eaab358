"""Frozen references, against which KL is measured."""

from __future__ import annotations

import copy

from rlft.models.base import CausalLM


def initial(policy: CausalLM) -> CausalLM:
    """Return a frozen copy of `policy` as it is now; a resumed run makes it from the same starting weights."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def none(policy: CausalLM) -> None:
    """No reference."""
