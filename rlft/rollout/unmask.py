"""Sampling from a masked-diffusion model: hidden tokens are filled in over several rounds, each of one forward.

There are two orders. "ancestral" runs the noise process backwards (Sahoo et al., MDLM, arXiv:2406.07524, with the
schedule alpha = 1 - t): a token that is hidden at t is shown by s < t with probability (t - s) / t, wherever it stands.
"confidence" shows in each round the tokens that the model is surest of, the same number in every round, and hides the
others again (Nie et al., LLaDA, arXiv:2502.09992, section 2.4, low-confidence remasking).

Both papers draw anew in each round. Here a place has one uniform for its token in all rounds, and with "ancestral" one
for the time at which it is shown (both counted, see `rlft/rollout/sampling.py`). For "ancestral" the distribution is
the same, because each token is drawn in one round only. "confidence" differs: in the paper an unlikely token is drawn
again and again, and passed over each time, so that text comes out sharper than the model at temperature 1; with one
uniform a place keeps its draw until its turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.core.errors import ConfigError, nearest
from rlft.models.base import CausalLM
from rlft.rollout.sampling import Identity, Sampling, choose

ORDERS = ("confidence", "ancestral")


@dataclass(frozen=True)
class Unmasking:
    """How hidden tokens are filled in.

    Arguments:
        num_rounds: the most forwards; with as many rounds as hidden tokens "confidence" shows one token a round.
        order: "confidence" or "ancestral".
        temperature: divides the logits that tokens are drawn from; > 0. Confidence is the probability at 1.
    """

    num_rounds: int
    order: str = "confidence"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"the rounds of unmasking must be at least 1, got {self.num_rounds}")
        if self.order not in ORDERS:
            raise ConfigError(
                f"the order of unmasking is one of {', '.join(ORDERS)}, got '{self.order}'{nearest(self.order, ORDERS)}"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}; 0.01 all but takes the likeliest")


@torch.no_grad()
def unmask(
    policy: CausalLM,
    ids: Tensor,
    *,
    how: Unmasking,
    seed: int,
    step: int = 0,
    stream: str = "unmask",
    first_row: int = 0,
) -> Tensor:
    """Return `ids` `[B, T]` int64 with every `policy.mask_id` replaced by a drawn token; the others stay.

    The draws at place i of row b are a function of (seed, stream, step, first_row + b, i). The logits of all tokens
    that a round draws are in memory at once; for "confidence" these are all hidden tokens. Raises `ConfigError` for a
    causal policy.
    """
    if policy.mask_id is None:
        raise ConfigError("a causal model has no [MASK] to fill in: sample it with rlft.rollout.engine.generate")
    B, T = ids.shape
    identities = (Identity(seed, stream, step, list(range(first_row, first_row + B)), [kind] * B) for kind in (0, 1))
    draws, times = (identity.uniforms(T, device=ids.device) for identity in identities)
    was_training = policy.training
    policy.eval()
    num_hidden = (ids == policy.mask_id).sum(dim=1)  # [B] before the first round
    for k in range(how.num_rounds):
        drawn = ids == policy.mask_id
        if how.order == "ancestral":  # the clock runs from 1 to 0 and shows a token in the round that passes its time
            drawn &= times >= 1 - (k + 1) / how.num_rounds
        if not drawn.any():
            continue
        tokens, confidence = _draw(policy, ids, drawn, draws, temperature=how.temperature)
        if how.order == "confidence":
            quota = num_hidden // how.num_rounds + (k < num_hidden % how.num_rounds)
            order = confidence.argsort(dim=1, descending=True, stable=True)  # the earlier of two equals first
            drawn &= order.argsort(dim=1) < quota[:, None]
        ids = torch.where(drawn, tokens, ids)
    policy.train(was_training)
    return ids


def _draw(policy: CausalLM, ids: Tensor, places: Tensor, draws: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token at each of `places`: tokens `[B, T]`, and their logprobs at temperature 1, -inf elsewhere."""
    states = policy(ids)[places]  # [N, C]
    logits = states @ policy.head_weight.to(states.dtype).t()  # [N, V]
    tokens, _ = choose(logits, draws[places], sampling=Sampling(1, temperature))
    logprobs = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32)).gather(1, tokens[:, None])[:, 0]
    confidence = logprobs.new_full(ids.shape, -torch.inf).masked_scatter(places, logprobs)
    return torch.zeros_like(ids).masked_scatter(places, tokens), confidence
