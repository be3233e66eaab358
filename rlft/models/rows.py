"""Prompts and completions as a model reads them: padded, or packed one after the other without padding.

Everything in a transformer but attention treats tokens one by one, and that is nine tenths of its arithmetic. So a
model that leaves attention to its cache (`CausalLM.takes_packed`) reads P prompts and B completions as one row of N
tokens, `[prompts | completions]`. Only attention spreads them out into rows, and not even that where it is compiled
(`rlft.cpu.attention`). Each prompt is in there once for its whole group: its completions attend to its keys and values,
and gradients flow back through them, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.core.batch import Rows, num_read
from rlft.core.errors import ConfigError
from rlft.cpu.attention import Segments
from rlft.models.base import CausalLM
from rlft.models.kv.packed import PackedCache, Packing
from rlft.models.kv.prefix import PrefixCache

WORTH_LEAVING = 0.9  # share of the tokens that predict something, from which on the last layer runs on all tokens
Packed = tuple[Tensor, Tensor, Tensor, PackedCache]  # ids [N], positions [N], predictors [B, T] among the N, cache


def predictors(policy: CausalLM, rows: Rows) -> Tensor:
    """Return `[N, C]`: the hidden states that predict the N counted completion tokens, row by row."""
    if policy.mask_id is not None:
        raise ConfigError(
            "a bidirectional model has no next-token probabilities: train it with algo=denoise, or set "
            "model.is_causal=true"
        )
    if not policy.takes_packed:
        return _padded_predictors(policy, rows)[rows.completion_mask]
    B, device = len(rows.completion_ids), rows.prompt_of_row.device
    is_shared = len(rows.prompt_ids) != B or not torch.equal(rows.prompt_of_row, torch.arange(B, device=device))
    ids, positions, predictor, cache = (_shared_prompts if is_shared else _whole_rows)(rows)
    # Only states that predict a counted token are wanted: `outputs` [M] among the N, and `places` among those M. Where
    # most tokens predict one, all states are computed: leaving out a few costs more than it saves.
    outputs, places = predictor[rows.completion_mask].unique(return_inverse=True)
    if len(outputs) >= WORTH_LEAVING * len(ids):
        outputs, places = None, predictor[rows.completion_mask]
    hidden = policy(ids[None], positions=positions[None], cache=cache, outputs=outputs)
    return hidden.squeeze(0).index_select(0, places)  # `hidden[0]` would copy its gradient


def prefill(policy: CausalLM, prompt_ids: Tensor, lengths: Tensor) -> tuple[Tensor, PrefixCache]:
    """Forward prompts `[P, S]`; return the last hidden state of each, `[P, C]`, and their keys and values."""
    if not policy.takes_packed:
        prefix = PrefixCache(lengths)
        hidden = policy(prompt_ids, cache=prefix)
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1], prefix
    prompts = Packing(lengths, prompt_ids.shape[1])
    cache, ids = PackedCache(prompts), prompts.pack(prompt_ids)
    return policy(ids[None], positions=prompts.positions[None], cache=cache, outputs=prompts.ends)[0], cache.prefix


def _shared_prompts(rows: Rows) -> Packed:
    """Pack `[prompts | completions]`: a prompt is there once for its whole group."""
    prompts = Packing(rows.prompt_lengths, rows.prompt_ids.shape[1])
    completions = Packing(num_read(rows), rows.completion_ids.shape[1] - 1)
    ids = torch.cat([prompts.pack(rows.prompt_ids), completions.pack(rows.completion_ids[:, :-1])])
    firsts = rows.prompt_lengths[rows.prompt_of_row, None].expand(completions.shape)
    positions = torch.cat([prompts.positions, completions.pack(firsts) + completions.positions])
    tokens = completions.starts[:, None] + torch.arange(completions.shape[1], device=ids.device)
    predictor = torch.cat([prompts.ends[rows.prompt_of_row, None], prompts.num_tokens + tokens], dim=1)
    cache = PackedCache(prompts, completions, rows.prompt_of_row)
    cache.segments = Segments.of(
        prompts.segments(), completions.segments(num_before=prompts.num_tokens), rows.prompt_of_row
    )
    return ids, positions, predictor, cache


def _whole_rows(rows: Rows) -> Packed:
    """Pack `[prompt, completion, prompt, completion, …]` where no two rows share a prompt: plain causal attention."""
    prompt_lengths, S, T = rows.prompt_lengths[:, None], rows.prompt_ids.shape[1], rows.completion_ids.shape[1]
    lengths = rows.prompt_lengths + num_read(rows)
    packing = Packing(lengths, int(lengths.max()))
    place = torch.arange(packing.shape[1], device=lengths.device).expand(packing.shape)
    of_prompt = rows.prompt_ids.gather(1, place.clamp(max=S - 1))
    of_completion = rows.completion_ids.gather(1, (place - prompt_lengths).clamp(min=0, max=T - 1))
    ids = packing.pack(torch.where(place < prompt_lengths, of_prompt, of_completion))
    predictor = packing.starts[:, None] + prompt_lengths - 1 + torch.arange(T, device=lengths.device)
    cache, segments = PackedCache(packing), packing.segments()
    cache.segments = Segments.of(segments, segments[:0], rows.prompt_of_row[:0])
    return ids, packing.positions, predictor, cache


def _padded_predictors(policy: CausalLM, rows: Rows) -> Tensor:
    """Return `[B, T, C]` by a forward of the prompts and one of the completions, which read the prompts' cache."""
    num_slots, num_new = rows.prompt_ids.shape[1], rows.completion_ids.shape[1] - 1
    if num_slots == 1 and len(rows.prompt_ids) == len(rows.completion_ids):
        # Plain text, a context of one token for each row and none shared: one causal forward over whole rows.
        first = rows.prompt_ids[rows.prompt_of_row]
        return policy(torch.cat([first, rows.completion_ids[:, :-1]], dim=1))
    last, prefix = prefill(policy, rows.prompt_ids, rows.prompt_lengths)
    first = last.index_select(0, rows.prompt_of_row)[:, None]
    if num_new == 0:
        return first
    positions = rows.prompt_lengths[rows.prompt_of_row, None] + torch.arange(num_new, device=last.device)
    # Padding after a completion's end could run past the last position; what is computed there is never read.
    positions = positions.clamp(max=policy.context_length - 1)
    expanded = prefix.expand(rows.prompt_of_row)
    return torch.cat([first, policy(rows.completion_ids[:, :-1], positions=positions, cache=expanded)], dim=1)
