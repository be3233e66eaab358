"""A bigram language model counted from the training text: the weakest reference that has seen the data.

    p(b | a) = (c(a, b) + alpha p(b)) / (c(a) + alpha),    p(b) = (c(b) + 1) / (N + V)

c(a, b) counts how often b follows a, c(a) and c(b) count tokens, and N is the number of all tokens. This is the
estimate under a Dirichlet prior whose mean is the unigram distribution (MacKay & Peto, "A hierarchical Dirichlet
language model", Natural Language Engineering 1(3), 1995). In other words, bigram and unigram frequencies are
interpolated, lambda p_ML(b | a) + (1 - lambda) p(b) with lambda = c(a) / (c(a) + alpha) (Chen & Goodman, "An empirical
study of smoothing techniques for language modeling", TR-10-98, 1998). Unlike in MacKay & Peto, alpha is given and the
unigram is smoothed by adding one, so that no probability is zero and every KL is finite.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.core.errors import ConfigError, DataError
from rlft.data.encode import Encoder
from rlft.data.source import Source
from rlft.data.text import TextData
from rlft.models.base import CausalLM
from rlft.models.kv.base import Cache, CacheShape

LARGEST_VOCABULARY = 8192  # the table takes 256 MiB of float32, and scoring as much for every 8,192 tokens


class Corpus(Protocol):
    """Data whose whole training texts can be read: `TextData`, and `PromptData` even if prompts are openings only."""

    @property
    def source(self) -> Source: ...


class Bigram(CausalLM):
    """A frozen table of next-token log-probabilities behind the contract of a policy.

    A token's hidden state is its row of the table, so C = V and the head is the identity. Positions and earlier tokens
    play no part; the cache is given keys and values of width 0, so that it counts its slots.

    Arguments:
        log_probs: [V, V] floating, log p(next | token) in nats at [token, next].
        context_length: the policy's.
    """

    log_probs: Tensor

    def __init__(self, log_probs: Tensor, *, context_length: int) -> None:
        super().__init__()
        self.vocab_size, self.context_length = len(log_probs), context_length
        self.cache_shape, self.num_heads = CacheShape(num_layers=1, num_kv_heads=1, head_dim=0), 1
        self.register_buffer("log_probs", log_probs)

    def forward(self, input_ids: Tensor, *, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        if cache is not None:
            B, T = input_ids.shape
            nothing = self.log_probs.new_empty(B, 1, T, 0)
            cache.extend(0, nothing, nothing)
        return F.embedding(input_ids, self.log_probs)

    @property
    def head_weight(self) -> Tensor:
        """The identity `[V, V]`; on a CPU it is sparse, which is three times faster and gives the same bits.

        On a GPU the dense product takes a millisecond, and the sparse one has no bfloat16 (pytorch#144040).
        """
        like, V = self.log_probs, self.vocab_size
        if like.device.type != "cpu":
            return torch.eye(V, dtype=like.dtype, device=like.device)
        places = torch.arange(V).expand(2, V)
        return torch.sparse_coo_tensor(places, like.new_ones(V), (V, V), check_invariants=True, is_coalesced=True)

    def config_dict(self) -> dict:
        return {"vocab_size": self.vocab_size, "context_length": self.context_length}

    def save_hf(self, directory: str | Path, *, eos_id: int | None = None) -> None:
        raise ConfigError("a bigram model is a reference only: there is no Hugging Face format to save it in")


def bigram(policy: CausalLM, *, data: Corpus, tokenizer: Encoder, alpha: float) -> Bigram:
    """Return a bigram model of the training split's whole texts, each with the end-of-text token at its end.

    Arguments:
        policy: gives the vocabulary, the context, dtype and device.
        data: its source's training texts are counted; their ids are kept in the cache directory.
        tokenizer: turns them into ids.
        alpha: the weight of the unigram distribution, as a number of observations of the token; > 0.

    Raises `ConfigError` for an `alpha` that is not positive or a vocabulary above `LARGEST_VOCABULARY`, `DataError`
    where there is no text.
    """
    V = policy.vocab_size
    if V > LARGEST_VOCABULARY:
        raise ConfigError(
            f"reference=bigram holds a table of V x V: the policy's vocabulary of {V:,} would take "
            f"{4 * V * V / 2**30:.0f} GiB, and at most {LARGEST_VOCABULARY:,} is allowed. Take reference=initial, or a "
            f"tokenizer with a smaller vocabulary"
        )
    if not 0 < alpha < math.inf:
        raise ConfigError(f"reference.alpha={alpha} must be above 0 and finite: without it unseen pairs have no KL")
    tokens = TextData(data.source, tokenizer=tokenizer, block_size=1).tokens("train")
    if not len(tokens):
        raise DataError("reference=bigram: the train split has no text to count")
    log_probs = smoothed(pair_counts(tokens, vocab_size=V), alpha=alpha)
    return Bigram(log_probs.to(policy.head_weight), context_length=policy.context_length).eval()


def pair_counts(tokens: np.ndarray, *, vocab_size: int) -> Tensor:
    """Return how often each token follows each, int64 `[V, V]` at [token, next], from tokens `[T]` read as a ring.

    In a ring every token is a context once and a target once: the first text follows the last one.
    """
    pairs = tokens.astype(np.int64) * vocab_size + np.roll(tokens, -1)
    return torch.from_numpy(np.bincount(pairs, minlength=vocab_size**2)).view(vocab_size, vocab_size)


def smoothed(counts: Tensor, *, alpha: float) -> Tensor:
    """Return log p(b | a) float64 `[V, V]` at [a, b] from counts int64 `[V, V]`, by the module's formula."""
    table = counts.double()
    unigram = table.sum(dim=0) + 1
    unigram /= unigram.sum()
    totals = table.sum(dim=1, keepdim=True) + alpha
    return table.add_(alpha * unigram).div_(totals).log_()
