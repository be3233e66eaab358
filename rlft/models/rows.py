"""Prompts and completions as a model reads them: padded, or packed one after the other without padding.

Everything in a transformer but attention treats tokens one by one, and that is nine tenths of its arithmetic. So a
model that leaves attention to its cache (`CausalLM.takes_packed`) reads P prompts and B completions as one row of N
tokens, `[prompts | completions]`, and only attention spreads them out into rows, unless it is compiled
(`rlft.cpu.attention`). Each prompt stands there once for its whole group: its completions attend to its keys and
values, and gradients flow back through them, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.core.batch import Rows
from rlft.core.errors import ConfigError
from rlft.models.base import CausalLM
from rlft.models.kv.packed import PackedPrefix, PackedRows, UnsharedRows, is_unshared
from rlft.models.kv.prefix import PrefixCache


def predictors(policy: CausalLM, rows: Rows) -> Tensor:
    """Return `[N, C]`: the hidden states that predict the N counted completion tokens, row by row."""
    if policy.mask_id is not None:
        raise ConfigError(
            "a bidirectional model has no next-token probabilities: train it with algo=denoise, or set "
            "model.is_causal=true"
        )
    if not policy.takes_packed:
        return _padded_predictors(policy, rows)[rows.completion_mask]
    packed = UnsharedRows(rows) if is_unshared(rows) else PackedRows(rows)
    hidden = policy(packed.ids[None], positions=packed.positions[None], cache=packed, outputs=packed.outputs)
    return hidden.squeeze(0).index_select(0, packed.before)  # `hidden[0]` would copy its gradient


def prefill(policy: CausalLM, prompt_ids: Tensor, lengths: Tensor) -> tuple[Tensor, PrefixCache]:
    """Forward prompts `[P, S]`; return the last hidden state of each, `[P, C]`, and their keys and values."""
    if not policy.takes_packed:
        prefix = PrefixCache(lengths)
        hidden = policy(prompt_ids, cache=prefix)
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1], prefix
    packed = PackedPrefix(lengths, num_slots=prompt_ids.shape[1])
    ids, positions = packed.packing.pack(prompt_ids), packed.packing.positions
    return policy(ids[None], positions=positions[None], cache=packed, outputs=packed.packing.ends)[0], packed


def _padded_predictors(policy: CausalLM, rows: Rows) -> Tensor:
    """Return `[B, T, C]`, by a pass over the prompts and one over the completions, which a cache ties together."""
    num_slots, num_new = rows.prompt_ids.shape[1], rows.completion_ids.shape[1] - 1
    if num_slots == 1 and len(rows.prompt_ids) == len(rows.completion_ids):
        # One token of context for each row, none shared (plain text): a single causal pass over the whole row.
        first = rows.prompt_ids[rows.prompt_of_row]
        return policy(torch.cat([first, rows.completion_ids[:, :-1]], dim=1))
    last, prefix = prefill(policy, rows.prompt_ids, rows.prompt_lengths)
    first = last.index_select(0, rows.prompt_of_row)[:, None]
    if num_new == 0:
        return first
    positions = rows.prompt_lengths[rows.prompt_of_row, None] + torch.arange(num_new, device=last.device)
    # Padding after a completion's end would run past the last position; what it computes is never read.
    positions = positions.clamp(max=policy.context_length - 1)
    expanded = prefix.expand(rows.prompt_of_row)
    return torch.cat([first, policy(rows.completion_ids[:, :-1], positions=positions, cache=expanded)], dim=1)
