"""GPT-2's activation, tanh GELU, compiled for large float32 tensors on the CPU, where torch's tanh is slow.

    gelu(x) = 0.5 x (1 + tanh(u)) = x s,  s = 1 / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)

GELU and its gradient take a tenth of an update at 11 M parameters in torch, and half of that compiled. numba is an
optional dependency (the extra `fast`) and slow to import, so the first large tensor imports it.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.cpu import compiled
from rlft.cpu.compiled import f32, sigmoid_2u

MIN_SIZE = 2**18  # entries; below this the calls cost what they save
CHUNK = 1024  # entries; each thread takes whole chunks, so that the number of threads changes no bit


def gelu(x: Tensor) -> Tensor:
    """Return tanh GELU of `x`, of any shape and dtype; differentiable once."""
    is_ours = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= MIN_SIZE and x.is_contiguous()
    return _Gelu.apply(x) if is_ours and compiled.is_possible() else F.gelu(x, approximate="tanh")


class _Gelu(torch.autograd.Function):
    """d gelu / dx = s + x s (1 - s) 2 du/dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _in_threads(_compiled()[0], x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        _in_threads(_compiled()[1], x, grad.contiguous(), grad_x)
        return grad_x


def _in_threads(function: Any, *tensors: Tensor) -> None:
    """Call a compiled function on equal parts of the tensors, the last of which it writes."""
    arrays = [tensor.detach().view(-1).numpy() for tensor in tensors]
    size = len(arrays[0])
    part = -(-size // (torch.get_num_threads() * CHUNK)) * CHUNK
    parts = [slice(start, start + part) for start in range(0, size, part)]
    if not function.signatures:  # compile in this thread, where a signal can interrupt it
        compiled.precompile(function, *arrays)
    compiled.in_threads([partial(function, *(array[these] for array in arrays)) for these in parts])


@cache
def _compiled() -> tuple[Any, Any]:
    """Return `_forward` and `_backward`, compiled so that infinities and NaNs keep their meaning."""
    options = compiled.options("contract", "nsz", "arcp")
    return compiled.function(_forward, options), compiled.function(_backward, options)


def _forward(x, y):
    for i in range(len(x)):
        y[i] = x[i] * sigmoid_2u(x[i])


def _backward(x, grad, grad_x):
    for i in range(len(x)):
        v = x[i]
        s = sigmoid_2u(v)
        slope = f32(1.5957691216057308) * (f32(1) + f32(0.134145) * v * v)
        grad_x[i] = grad[i] * (s + v * s * (f32(1) - s) * slope)
