"""What a mask means, for every function of this package that takes one, and which shapes may meet."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bool(mask: Tensor, like: Tensor) -> Tensor:
    """Return `mask` as bool, [B, T], true where it is not zero.

    Raises:
        ValueError: if the mask is not of `like`'s shape; it is never broadcast, because a [T] mask would fit unnoticed.
    """
    if mask.shape != like.shape:
        raise ValueError(f"mask must have the shape of what it masks, {list(like.shape)}, got {list(mask.shape)}")
    return mask if mask.dtype == torch.bool else mask != 0


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` where the mask is true and 0 elsewhere, whatever stands there: `x * mask` would turn nan into nan.

    The gradient is 0 outside as well. `mask` is bool or float, of `x`'s shape.
    """
    return torch.where(as_bool(mask, x), x, torch.zeros_like(x))


def require_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes: broadcasting would pair rows with times without a word.

    Raises:
        ValueError: naming each argument with its shape.
    """
    if len({x.shape for x in tensors.values()}) > 1:
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{' and '.join(tensors)} must have one shape, got {given}")
