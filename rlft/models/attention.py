"""Attention of a group's completions to the prompt that they share, and each to itself: one softmax over both.

The prompt's keys and values stay as they are, [P, H, S, D]: a group's queries meet them in one matrix product, where an
ordinary kernel wants a copy for each row. On a CPU that takes half the time at a prompt of 256 tokens and groups of 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fits(queries: Tensor) -> bool:
    """Whether `shared_attention` is the faster way, by measurement, and holds no more than copies would.

    It keeps T x (S + T) weights a row and head, against 2 x (S + T) x D of copied keys and values and what a kernel
    saves of its own; narrow heads are better off in torch's kernel.
    """
    head_dim, T = queries.shape[3], queries.shape[2]
    return queries.device.type == "cpu" and head_dim >= 32 and 2 * head_dim >= T


def shared_attention(
    queries: Tensor, keys: Tensor, values: Tensor, prompt_keys: Tensor, prompt_values: Tensor, lengths: Tensor
) -> Tensor:
    """Return softmax(q [k_prompt, k]^T / sqrt(D)) [v_prompt, v], causal among the new tokens; differentiable.

    Args:
        queries, keys, values: [B, H, T, D]; rows p * G .. (p + 1) * G - 1 continue prompt p, G = B / P.
        prompt_keys, prompt_values: [P, H, S, D].
        lengths: [P] int64, tokens in each prompt; what lies behind them is not attended to.

    Returns:
        [B, H, T, D], as `scaled_dot_product_attention` over copied prompts, up to rounding.
    """
    T, S = queries.shape[2], prompt_keys.shape[2]
    gap = torch.arange(S, device=lengths.device) >= lengths[:, None]
    future = torch.ones(T, T, dtype=torch.bool, device=lengths.device).triu(1)
    hidden = torch.cat([gap[:, None].expand(-1, T, -1), future.expand(len(lengths), -1, -1)], dim=2)
    bias = queries.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]  # [P, 1, T, S + T]
    return _SharedAttention.apply(queries, keys, values, prompt_keys, prompt_values, bias)


class _SharedAttention(torch.autograd.Function):
    """d weights = d out v^T;  d scores = weights (d weights - sum(weights d weights))."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        bias: Tensor,
    ) -> Tensor:
        B, H, T, D = queries.shape
        P, _, S, _ = prompt_keys.shape
        ctx.sizes = P, B // P, H, T, S, D
        scale = D**-0.5
        q, k, v = _grouped(queries * scale, P), _grouped(keys, P), _grouped(values, P)  # [P H G, T, D]
        kp, vp = prompt_keys.reshape(P * H, S, D), prompt_values.reshape(P * H, S, D)
        of_prompt = torch.bmm(q.view(P * H, -1, D), kp.transpose(1, 2)).view(-1, T, S)
        scores = torch.cat([of_prompt, torch.bmm(q, k.transpose(1, 2))], dim=2)
        scores.view(P, -1, T, S + T).add_(bias)
        weights = scores.softmax(dim=2)
        out = torch.bmm(_of_prompt(weights, P * H, S), vp).view(-1, T, D)
        out.baddbmm_(weights[..., S:], v)
        ctx.save_for_backward(q, k, v, kp, vp, weights)
        return _ungrouped(out, P, H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kp, vp, weights = ctx.saved_tensors
        P, _, H, T, S, D = ctx.sizes
        grad = _grouped(grad, P)
        joint = grad.view(P * H, -1, D)
        of_prompt = _of_prompt(weights, P * H, S)
        grad_vp, grad_v = torch.bmm(of_prompt.transpose(1, 2), joint), torch.bmm(weights[..., S:].transpose(1, 2), grad)
        to_prompt = torch.bmm(joint, vp.transpose(1, 2)).view(-1, T, S)
        grad_weights = torch.cat([to_prompt, torch.bmm(grad, v.transpose(1, 2))], dim=2)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, 2, weights.dtype)
        to_prompt, own = _of_prompt(grad_scores, P * H, S), grad_scores[..., S:]
        grad_q = torch.bmm(to_prompt, kp).view(-1, T, D)
        grad_q.baddbmm_(own, k).mul_(D**-0.5)
        grad_kp, grad_k = torch.bmm(to_prompt.transpose(1, 2), q.view(P * H, -1, D)), torch.bmm(own.transpose(1, 2), q)
        mine = (_ungrouped(x, P, H) for x in (grad_q, grad_k, grad_v))
        return *mine, grad_kp.view(P, H, S, D), grad_vp.view(P, H, S, D), None


def _grouped(x: Tensor, num_prompts: int) -> Tensor:
    """`[B, H, T, D]` to `[P H G, T, D]`, the rows of a group next to each other under each head."""
    B, H, T, D = x.shape
    return x.reshape(num_prompts, B // num_prompts, H, T, D).transpose(1, 2).reshape(-1, T, D)


def _ungrouped(x: Tensor, num_prompts: int, num_heads: int) -> Tensor:
    """Turn `_grouped` back; the result lies in memory as [B, T, H, D], as its users want it."""
    _, T, D = x.shape
    x = x.view(num_prompts, num_heads, -1, T, D).permute(0, 2, 3, 1, 4)  # [P, G, T, H, D]
    return x.reshape(-1, T, num_heads, D).transpose(1, 2)


def _of_prompt(weights: Tensor, num_pairs: int, num_slots: int) -> Tensor:
    """The part of `[P H G, T, S + T]` that falls on prompts, a group's rows together: `[P H, G T, S]`."""
    return weights.view(num_pairs, -1, weights.shape[2])[..., :num_slots]
