"""Random tensors, masks and invalid values for the tests of rlft.functional."""

from __future__ import annotations

import torch
from torch import Tensor

GARBAGE = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300], dtype=torch.float64)


def randoms(seed: int, *shape: int, num: int = 1) -> list[Tensor]:
    """`num` tensors of float64 normal numbers, each a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(num)]


def random_mask(seed: int, rows: int, times: int) -> Tensor:
    """Bool [rows, times], right-padded as in a rollout: row lengths from 0 to `times`, at least one row not empty."""
    lengths = torch.randint(0, times + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    lengths[0] = max(int(lengths[0]), 1)
    return torch.arange(times)[None] < lengths[:, None]


def holed_mask(seed: int, rows: int, times: int) -> Tensor:
    """Bool [rows, times] with holes anywhere, at least one entry true."""
    mask = torch.rand(rows, times, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0, 0] = True
    return mask


def with_garbage(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with nan, inf, -inf and 1e300 in turn where the mask is false."""
    filler = GARBAGE[torch.arange(x.numel()) % len(GARBAGE)].reshape(x.shape).to(x.dtype)
    return torch.where(mask, x, filler)


def padded(x: Tensor, by: int, filler: float = torch.nan) -> Tensor:
    """`x` [B, T] with `by` columns appended on the right."""
    return torch.cat([x, torch.full((x.shape[0], by), filler, dtype=x.dtype)], 1)
