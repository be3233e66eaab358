"""A policy that is a table of logits, one row for each context; it can represent every distribution over completions.

It is a `CausalLM` with a cache, so that the engine, the scorer and the trainer treat it as any other model. Since
p(v | c) = softmax(table[c])[v], its gradient can be written down by hand.
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
    """Next-token logits [contexts, V] in float64; the hidden state is the context's row, the head the identity.

    A context is all tokens before the next one, the prompt's included. It is looked up by its code, the sum of
    (id + 1) (V + 1)^position over its tokens; a cache keeps each token's term of that sum in place of its keys. A
    context that is not in the table (inside a prompt, after an end token, at a wrong position) has logits nan, so that
    the loss is not finite if it is ever counted.

    Arguments:
        contexts: ids of every context, none twice.
        table: [contexts, V], floating point; copied.
    """

    codes: Tensor  # [contexts] float64, ascending
    places: Tensor  # [contexts] int64, the row of each code
    identity: Tensor  # [V, V]

    def __init__(self, contexts: Sequence[tuple[int, ...]], table: Tensor) -> None:
        super().__init__()
        self.vocab_size = table.shape[1]
        self.context_length = max(len(context) for context in contexts) + 1
        if (self.vocab_size + 1) ** self.context_length > 2**53:
            count = f"{self.context_length} tokens of {self.vocab_size}"
            raise ConfigError(f"{count} are more contexts than float64 counts")
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
