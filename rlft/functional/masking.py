"""Masks and checks of shapes, for all functions of this package."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bool(mask: Tensor, like: Tensor) -> Tensor:
    """Return `mask` as bool, [B, T], true where it is not zero.

    Raises:
        ValueError: if the mask has not `like`'s shape. Masks are never broadcast: a [T] mask by mistake would fit.
    """
    if mask.shape != like.shape:
        raise ValueError(f"mask must have the shape of what it masks, {list(like.shape)}, got {list(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` where the mask is true and 0 elsewhere, even where `x` is nan (`x * mask` would keep nan).

    The gradient is 0 outside the mask as well. `mask` is bool or float, of `x`'s shape.
    """
    return torch.where(as_bool(mask, x), x, torch.zeros_like(x))


def require_same_shape(**tensors: Tensor) -> None:
    """Raise `ValueError`, which names each argument's shape, if shapes differ.

    Broadcasting could silently pair rows with times.
    """
    if len({x.shape for x in tensors.values()}) > 1:
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{' and '.join(tensors)} must have one shape, got {given}")
