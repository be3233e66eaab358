"""Counted sampling: a token is a pure function of (distribution, seed, sample identity, position).

Each (sample, position) has one uniform from a counter-based generator, and the token is the inverse of the cumulative
distribution at that uniform. Batch size, order, rank, world size and resume change no draw.

`choose` is the sampling rule of everything in torch. `rlft.cpu.decode_steps` has the same rule, without filters,
compiled: tests/cpu/test_decode.py compares it with a naive loop, and tests/trainer/test_fast_paths.py with this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlft.core.errors import ConfigError
from rlft.core.rng import random_rows

BLOCK = 256  # tokens of a large vocabulary whose probabilities are summed first
BELOW_ONE = 1.0 - 2.0**-53


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Arguments:
        max_new_tokens: the longest completion, its end token included.
        temperature: divides the logits; > 0 (use `greedy` for the limit at 0).
        top_k, top_p: keep the k likeliest tokens / the smallest set of likeliest tokens with mass >= p; 0 and 1.0: off.
        min_new_tokens: the end token is not drawn before this many tokens.
        greedy: take the likeliest token instead of drawing.
        max_rows: the most completions that decode at once; others begin as those end. None: all of them.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    greedy: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature must be above 0, got {self.temperature}; at 0 it would be greedy=true (--greedy)"
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
    counts = [(member, prompt, step) for prompt, member in zip(prompts, members, strict=True)]
    return random_rows(seed, stream, counts, size=num_tokens)


@dataclass(frozen=True)
class Identity:
    """The identity of B samples, which their uniforms are a function of (see `uniforms`)."""

    seed: int
    stream: str
    step: int
    prompts: list[int]
    members: list[int]

    def uniforms(self, num_tokens: int, *, device: torch.device) -> Tensor:
        """Return uniforms in [0, 1), float64 `[B, num_tokens]`."""
        return torch.from_numpy(uniforms(**vars(self), num_tokens=num_tokens)).to(device)


def choose(
    logits: Tensor, uniform: Tensor | None, *, sampling: Sampling, eos_id: int | None = None, done: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose each row's next token: ids [B] int64, and their logprobs [B] under the distribution after all filters.

    Temperature, `min_new_tokens`, top-k and top-p apply in this order, then `sample`, or argmax without a uniform.

    Arguments:
        logits: [B, V] floating, the policy's own; they may be overwritten.
        uniform: [B] float64 in [0, 1), or None for the likeliest token.
        done: [B] int64, tokens that each row has drawn so far; needed for `min_new_tokens`, as is `eos_id`.
    """
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.min_new_tokens and eos_id is not None:
        assert done is not None
        logits[:, eos_id] = logits[:, eos_id].masked_fill(done < sampling.min_new_tokens, -torch.inf)
    logits = filtered(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    if uniform is not None:
        return sample(logits, uniform)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    ids = logits.argmax(dim=-1)
    return ids, logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]


def sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token from each row by the inverse cumulative distribution.

    Arguments:
        logits: [B, V] floating, after temperature and filters (-inf for what must not be drawn).
        uniform: [B] float64 in [0, 1).

    Returns:
        ids [B] int64: the first token whose cumulative probability exceeds the uniform (never one of probability 0);
        logprobs [B]: log softmax of the logits at ids, in the logits' dtype (float32 at least).
    """
    logprobs = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    probabilities, uniform = logprobs.exp(), uniform[:, None]
    if logits.shape[1] <= 2 * BLOCK:
        ids, _ = _place(probabilities.cumsum(dim=1, dtype=torch.float64), uniform)
    else:
        # Find the block of tokens that the draw falls in, then the token in it: float64 for two short sums only.
        V = logits.shape[1]
        whole = probabilities[:, : V - V % BLOCK].view(len(logits), -1, BLOCK)
        mass = torch.cat([whole.sum(dim=2), probabilities[:, V - V % BLOCK :].sum(dim=1, keepdim=True)], dim=1).double()
        cumulative = mass.cumsum(dim=1)
        block, target = _place(cumulative, uniform)
        size = mass.gather(1, block)
        rest = (target - (cumulative.gather(1, block) - size)) / size
        places = block * BLOCK + torch.arange(BLOCK, device=block.device)
        inside = torch.where(places < V, probabilities.gather(1, places.clamp(max=V - 1)), 0.0)
        place, _ = _place(inside.cumsum(dim=1, dtype=torch.float64), rest.clamp(0.0, BELOW_ONE))
        ids = (block * BLOCK + place).clamp(max=V - 1)  # NaN logits could lead beyond the vocabulary
    return ids[:, 0], logprobs.gather(1, ids)[:, 0]


def _place(cumulative: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first place [B, 1] whose cumulative mass [B, N] exceeds the target, and the target [B, 1].

    The target is `uniform` [B, 1] times the whole mass, so it stays below the last cumulative entry: a place without
    mass is never returned.
    """
    target = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1), target


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
