"""One completion, token by token as it is drawn, for a person who reads along."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlft.models.base import CausalLM
from rlft.rollout.batching import RunningBatch
from rlft.rollout.sampling import Identity, Sampling
from rlft.rollout.state import Prefilled, RolloutState


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
    ids, lengths = torch.tensor([prompt], device=device), torch.tensor([len(prompt)], device=device)
    identity = Identity(seed, stream, step, [prompt_number], [member])
    state = RolloutState(policy, lengths, identity, sampling=sampling, eos_id=eos_id)
    new = Prefilled.of(policy, ids, lengths, [range(1)], group_size=1)
    running = RunningBatch(policy, new, max_new=state.max_new)
    while True:
        token = running.draw(state)
        yield int(token)
        if not state.is_open(running.rows, running.done):
            return
        running.read(token)
