"""rlft/models/optimizer.py: torch's AdamW to the last bit, saved and loaded, without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from rlft.models.optimizer import AdamW

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def after_steps(kind: type[torch.optim.Optimizer], *, fused: bool, reload_at: int | None = None) -> torch.Tensor:
    """A parameter after four steps on gradients that are always the same; `reload_at` goes on with a new optimizer."""
    draws = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, 3, generator=draws))
    optimizer = kind([parameter], fused=fused, **SETTINGS)
    for step in range(4):
        if step == reload_at:
            state, optimizer = optimizer.state_dict(), kind([parameter], fused=fused, **SETTINGS)
            optimizer.load_state_dict(state)
        optimizer.zero_grad(set_to_none=True)
        parameter.grad = torch.randn(50, 3, generator=draws)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reload_at", [None, 2])
def test_steps_are_those_of_torch(fused, reload_at):
    expected = after_steps(torch.optim.AdamW, fused=fused)
    assert torch.equal(after_steps(AdamW, fused=fused, reload_at=reload_at), expected)


def test_a_closure_is_called_and_its_loss_returned():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], **SETTINGS)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (parameter < 1).all()


def test_no_compiler_is_imported():
    program = (
        "import sys, torch; from rlft.models.optimizer import AdamW; p = torch.nn.Parameter(torch.ones(2));"
        "o = AdamW([p], lr=0.1); o.zero_grad(); p.grad = torch.ones(2); o.step(); o.load_state_dict(o.state_dict());"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
