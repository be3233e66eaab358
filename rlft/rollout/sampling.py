"""Counted sampling: a token is a pure function of (distribution, seed, sample identity, position).

One uniform for each (sample, position) comes from a counter-based generator; the token is the inverse of the
cumulative distribution at it. Batch size, order, rank, world size and resume change no draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlft.counted import generator
from rlft.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Arguments:
        max_new_tokens: the longest completion, its end token included.
        temperature: divides the logits; > 0 (use `greedy` for the limit at 0).
        top_k, top_p: keep the k likeliest tokens / the smallest set of likeliest tokens with mass >= p; 0 and 1.0: off.
        min_new_tokens: the end token is not drawn before this many tokens.
        greedy: take the likeliest token instead of drawing.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature must be above 0, got {self.temperature}; for the limit at 0 use greedy=true"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_k must be >= 0 and top_p in (0, 1], got top_k={self.top_k}, top_p={self.top_p}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens must be in 0 .. max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}"
            )

    @property
    def is_plain(self) -> bool:
        """Whether tokens come from the policy's own distribution, as a policy gradient assumes."""
        return self.top_k == 0 and self.top_p == 1.0 and self.min_new_tokens == 0 and not self.greedy


def uniforms(
    *, seed: int, stream: str, step: int, prompts: list[int], members: list[int], num_tokens: int
) -> np.ndarray:
    """Return uniforms in [0, 1), float64 `[B, num_tokens]`; row b is member `members[b]` of prompt `prompts[b]`.

    The draw at position t depends on (seed, stream, step, prompt, member, t) only.
    """
    rows = [
        generator(seed, stream, member, prompt, step).random(num_tokens)
        for prompt, member in zip(prompts, members, strict=True)
    ]
    return np.stack(rows)


def sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token from each row by the inverse cumulative distribution.

    Arguments:
        logits: [B, V] floating, after temperature and filters (-inf for what must not be drawn).
        uniform: [B] float64 in [0, 1).

    Returns:
        ids [B] int64: the first token whose cumulative probability exceeds the uniform (never one of probability 0);
        logprobs [B]: log softmax of the logits at ids, in the logits' dtype (float32 at least).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_normalizer = logits.logsumexp(dim=-1)
    cumulative = (logits - log_normalizer[:, None]).exp().cumsum(dim=-1, dtype=torch.float64)
    # Scaling by the last entry makes the mass exactly one, so that rounding cannot leave a draw without a token.
    target = uniform[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return ids, logits.gather(1, ids[:, None])[:, 0] - log_normalizer


def filtered(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set all but the top-k / nucleus (Holtzman et al., arXiv:1904.09751) tokens of `[B, V]` logits to -inf.

    Ties with the k-th logit are kept. Top-k is applied before top-p, as elsewhere in the field.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)  # mass of the likelier tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
