"""One completion, token by token as it is drawn: for a person who reads along. `engine.generate` is for many."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlft.models.base import CausalLM
from rlft.models.kv.copied import DecodeCache
from rlft.models.rows import prefill
from rlft.rollout.sampling import Sampling, uniforms
from rlft.rollout.state import RolloutState


@torch.no_grad()
def stream(
    policy: CausalLM,
    prompt: list[int],
    *,
    sampling: Sampling,
    eos_id: int | None,
    seed: int,
    prompt_number: int = 0,
    member: int = 0,
    step: int = 0,
    stream: str = "rollout",
) -> Iterator[int]:
    """Yield the ids of the completion that `generate` draws for this sample, the end token included.

    The sample's identity is (seed, stream, step, prompt_number, member). Raises `ValueError` for an empty prompt or one
    that fills the context.
    """
    if not prompt or len(prompt) >= policy.context_length:
        raise ValueError(f"a prompt has 1 to {policy.context_length - 1} tokens, and this one has {len(prompt)}")
    device = policy.head_weight.device
    lengths = torch.tensor([len(prompt)], device=device)
    room = policy.context_length - lengths
    max_new = min(sampling.max_new_tokens, int(room))
    draws = None
    if not sampling.greedy:
        numbers = uniforms(
            seed=seed, stream=stream, step=step, prompts=[prompt_number], members=[member], num_tokens=max_new
        )
        draws = torch.from_numpy(numbers).to(device)
    table = RolloutState(room, draws, max_new=max_new, sampling=sampling, eos_id=eos_id, dtype=policy.head_weight.dtype)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    hidden, prefix = prefill(policy, torch.tensor([prompt], device=device), lengths)
    cache = DecodeCache(prefix, row, max_new_tokens=max_new, shape=policy.cache_shape)
    for step in range(max_new):
        token = table.draw(hidden @ policy.head_weight.t() / sampling.temperature, row, row + step)
        yield int(token)
        if not table.is_open(row, row + step + 1):
            return
        hidden = policy(token[:, None], positions=(lengths + step)[:, None], cache=cache)[:, 0]
