from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.models.attention import fits, shared_attention

P, G, H, T, S, D = 3, 2, 2, 4, 5, 3
LENGTHS = torch.tensor([5, 2, 4])


def inputs() -> tuple[Tensor, ...]:
    """Queries, keys and values of completions, keys and values of prompts."""
    noise = torch.Generator().manual_seed(0)
    sizes = [(P * G, H, T, D)] * 3 + [(P, H, S, D)] * 2
    return tuple(torch.randn(*size, dtype=torch.float64, generator=noise, requires_grad=True) for size in sizes)


def copied(q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor) -> Tensor:
    """Torch's own attention, over a copy of the prompt for each row."""
    of_row = torch.arange(P).repeat_interleave(G)
    seen = (torch.arange(S) < LENGTHS[of_row, None])[:, None, None].expand(-1, 1, T, -1)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(P * G, 1, T, T)
    keys, values = torch.cat([kp[of_row], k], dim=2), torch.cat([vp[of_row], v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=torch.cat([seen, causal], dim=3))


def test_values_and_gradients_are_those_of_copied_prompts() -> None:
    given = inputs()
    ours, theirs = shared_attention(*given, LENGTHS), copied(*given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, expected in zip(
        torch.autograd.grad((ours * weights).sum(), given),
        torch.autograd.grad((theirs * weights).sum(), given),
        strict=True,
    ):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *given: shared_attention(*given, LENGTHS), inputs())


def test_nothing_behind_a_prompts_end_is_seen() -> None:
    q, k, v, kp, vp = (x.detach() for x in inputs())
    before = shared_attention(q, k, v, kp, vp, LENGTHS)
    kp[1, :, 2:] += 100.0
    vp[1, :, 2:] += 100.0
    assert torch.equal(shared_attention(q, k, v, kp, vp, LENGTHS), before)


@pytest.mark.parametrize(("head_dim", "length", "expected"), [(64, 63, True), (16, 63, False), (64, 500, False)])
def test_it_is_for_wide_heads_and_short_completions(head_dim: int, length: int, expected: bool) -> None:
    assert fits(torch.empty(1, 1, length, head_dim)) == expected
