"""A policy that is a table of logits, one row for each context: every distribution over completions is one of its own.

It fills the contract of a language model, cache included, so that the engine, the scorer and the trainer work on it as
on any other; and its gradient can be written down by hand, p(v | c) being softmax(table[c])[v].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlft.core.errors import ConfigError
from rlft.models.base import CausalLM
from rlft.models.kv.base import Cache, CacheShape


class TabularPolicy(CausalLM):
    """Next-token logits `[contexts, V]`, float64; a token's hidden state is its context's row, the head the identity.

    A context is everything before a token, from the prompt's first on. It is known by its number, the sum of
    (id + 1) (V + 1)^position over its tokens; a cache keeps each token's term of that sum in the place of its keys. A
    context that the table does not have (inside a prompt, after an end token, at a wrong position) has logits nan: if
    anything of it ever counted, the loss would not be finite.

    Arguments:
        contexts: ids of every context, none twice.
        table: [contexts, V] floating; copied.
    """

    codes: Tensor  # [contexts] float64, ascending
    places: Tensor  # [contexts] int64, the row of each code
    identity: Tensor  # [V, V]

    def __init__(self, contexts: Sequence[tuple[int, ...]], table: Tensor) -> None:
        super().__init__()
        self.vocab_size = table.shape[1]
        self.context_length = max(len(context) for context in contexts) + 1
        if (self.vocab_size + 1) ** self.context_length > 2**53:
            raise ConfigError(
                f"{self.context_length} tokens of {self.vocab_size} are more contexts than float64 counts"
            )
        self.cache_shape, self.num_heads = CacheShape(num_layers=1, num_kv_heads=1, head_dim=1), 1
        self.table = nn.Parameter(table.detach().double().clone())
        base = self.vocab_size + 1
        codes = [sum((token + 1) * base**t for t, token in enumerate(context)) for context in contexts]
        ordered, places = torch.tensor(codes, dtype=torch.float64).sort()
        self.register_buffer("codes", ordered)
        self.register_buffer("places", places)
        self.register_buffer("identity", torch.eye(self.vocab_size, dtype=torch.float64))

    def forward(self, input_ids: Tensor, *, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        T = input_ids.shape[1]
        if positions is None:
            positions = torch.arange(T, device=input_ids.device)[None]
        terms = (input_ids + 1) * float(self.vocab_size + 1) ** positions.double()  # [B, T]
        mask = None
        if cache is not None:
            mask = cache.mask(T)
            terms = cache.extend(0, terms[:, None, :, None], terms[:, None, :, None])[0][:, 0, :, 0]  # [B, slots]
        codes = terms.cumsum(1)[:, -T:] if mask is None else torch.where(mask[:, 0], terms[:, None], 0.0).sum(-1)
        found = torch.searchsorted(self.codes, codes.contiguous()).clamp(max=len(self.codes) - 1)  # [B, T]
        known = self.codes[found] == codes
        return torch.where(known[..., None], self.table[self.places[found]], torch.nan)

    @property
    def head_weight(self) -> Tensor:
        return self.identity

    def config_dict(self) -> dict:
        return {"contexts": len(self.table), "vocab_size": self.vocab_size}

    def save_hf(self, directory: str | Path, *, eos_id: int | None = None) -> None:
        raise ConfigError("a table of logits has no Hugging Face format")
