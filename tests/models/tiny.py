"""Small policies whose logits are not tiny, and the plain forward that every fast path is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.core.batch import Rows
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2, GPT2Config


def tiny(
    seed: int = 0,
    *,
    vocab_size: int = 19,
    n_positions: int = 24,
    n_embd: int = 16,
    n_layer: int = 2,
    n_head: int = 2,
    dropout: float = 0.0,
    layer_norm_epsilon: float = 1e-5,
    dtype: torch.dtype = torch.float64,
) -> GPT2:
    """A GPT-2 with logits of several nats, and with biases and norms that are not 0 and 1."""
    config = GPT2Config(vocab_size, n_positions, n_embd, n_layer, n_head, dropout, layer_norm_epsilon)
    return shaken(GPT2(config).to(dtype), seed).eval()


@torch.no_grad()
def shaken(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter anew: N(0, 0.3) for matrices, and 0.3 times N(0, 1) on top of biases and norms."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fresh = torch.randn(parameter.shape, generator=noise, dtype=torch.float64) * 0.3
        parameter.copy_(fresh if parameter.dim() >= 2 else parameter.double() + fresh)
    return model


def logits_of(policy: CausalLM, ids: Tensor) -> Tensor:
    """`[B, T, V]` of a plain forward over `[B, T]`."""
    return policy(ids) @ policy.head_weight.t()


def plain_logprobs(policy: CausalLM, prompt: list[int], completion: list[int], *, temperature: float = 1.0) -> Tensor:
    """`[T]`: log pi(token | before) of one completion by one plain forward of the one row, without cache or padding."""
    logits = logits_of(policy, torch.tensor([prompt + completion[:-1]]))[0, len(prompt) - 1 :]
    return (logits / temperature).log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]


def random_ids(seed: int, lengths: list[int], *, vocab_size: int = 19) -> list[list[int]]:
    """Lists of token ids of the given lengths."""
    noise = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=noise).tolist() for n in lengths]


def rows_of(
    prompts: list[list[int]], completions: list[list[int]], prompt_of_row: list[int], *, filler: int = 0, extra: int = 0
) -> Rows:
    """Right-padded rows; the padding holds `filler` and is `extra` columns wider than it must be."""
    prompt_ids, _ = _padded(prompts, filler, extra)
    completion_ids, mask = _padded(completions, filler, extra)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return Rows(prompt_ids, lengths, torch.tensor(prompt_of_row), completion_ids, mask)


def _padded(rows: list[list[int]], filler: int, extra: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows) + extra
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[t < len(row) for t in range(width)] for row in rows])
