"""Checks that the chosen parts of an online algorithm fit together, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlft.algos.base import Setup, check_shared
from rlft.algos.online.advantage import CompletionAdvantage, TokenAdvantage, advantage_of
from rlft.algos.online.composition import Composition
from rlft.algos.parts import Part, Stateful, composed, function_of
from rlft.core.errors import ConfigError
from rlft.functional.advantages import beta_normalized, no_advantage
from rlft.functional.surrogates import score_function, sequence_ratio
from rlft.functional.weights import best_of_group, reward_weighted

SURROGATE_TENSORS = ("logprobs", "old_logprobs", "advantages", "mask")
Refusal = tuple[bool, str]  # whether a composition is refused, and the reason
AGGREGATION_TENSORS, AGGREGATION_COUNTS = ("x", "mask"), ("num_tokens", "num_sequences")


def surrogate_of(parts: Composition) -> Part:
    """Return the surrogate, checked: from logprobs and advantages [B, T] to each token's loss and statistics."""
    return composed(parts.surrogate, where="algo/surrogate", tensors=SURROGATE_TENSORS)


def aggregation_of(parts: Composition) -> Part:
    """Return the aggregation, checked: from tokens' losses x [B, T] to a scalar."""
    where, tensors = "algo/aggregation", AGGREGATION_TENSORS
    part = composed(parts.aggregation, where=where, tensors=tensors, from_run=AGGREGATION_COUNTS)
    if not part.names & {*AGGREGATION_COUNTS}:
        raise ConfigError(
            f"{where} must take {' or '.join(AGGREGATION_COUNTS)}, counts of the whole batch: without them the "
            f"loss would depend on the micro-batches"
        )
    return part


def validate(parts: Composition, setup: Setup) -> None:
    """Raise `ConfigError` for the first thing that makes no sense in a composition of online parts."""
    for applies, reason in (*_of_kl(parts, setup), *_of_advantage(parts, setup), *_of_updates(parts, setup)):
        if applies:
            raise ConfigError(reason)
    check_shared("prompts_per_step", setup.settings.prompts_per_step, setup)
    _try_parts(parts, advantage_of(parts.advantage), group_size=setup.settings.group_size)


def _of_kl(parts: Composition, setup: Setup) -> Iterator[Refusal]:
    """Invalid combinations of reference and KL."""
    kl = parts.kl
    # No reward trains, and nothing beside it.
    only_kl = function_of(parts.advantage) is no_advantage and not parts.entropy.entropy_coef
    yield (
        kl.base_coef > 0 and not setup.has_reference,
        "a KL penalty needs a reference: set reference=initial, or algo/kl=none",
    )
    yield (
        only_kl and not kl.is_in_loss,
        f"algo/advantage=none trains by the KL in the loss alone, and there is none: take algo/kl=exact with "
        f"algo.kl.coef above 0 (it is {kl.base_coef:g}, in the {kl.where}), and a teacher by reference=checkpoint",
    )
    yield (
        only_kl and setup.is_reference_initial,
        "algo/advantage=none moves a student to its teacher, and the reference is the policy itself as the run "
        "begins: the KL has no gradient there, ever. Name a teacher: reference=checkpoint reference.path=DIR",
    )
    yield (
        kl.is_in_reward and function_of(parts.advantage) is beta_normalized,
        "algo/advantage=beta_normalized is for rewards of 0 and 1, and a KL in the reward makes others of them: "
        "take a KL in the loss (algo/kl=k3), or algo/kl=none",
    )


def _of_advantage(parts: Composition, setup: Setup) -> Iterator[Refusal]:
    """Invalid combinations of the advantage with what it is computed from."""
    advantage, group_size = advantage_of(parts.advantage), setup.settings.group_size
    coef = parts.shaping.target_logprob_coef
    is_of_tokens, wants = isinstance(advantage, TokenAdvantage), advantage.part.names
    is_likelihood = function_of(parts.advantage) in (best_of_group, reward_weighted)
    yield (
        coef != 0 and not is_of_tokens,
        f"algo.target_logprob_coef={coef} is added to the reward of each token, and this "
        f"algo/advantage compares whole completions: take returns, running_baseline, group_returns or gae, or set "
        f"it to 0",
    )
    yield (
        "group_size" in wants and group_size < 2,
        f"group_size={group_size}: an advantage within the group needs at least 2 samples of a prompt; "
        f"algo=reinforce goes with one",
    )
    yield (
        parts.critic is not None and "values" not in wants,
        "a critic needs algo/advantage=gae, the only advantage that reads its values; drop it by algo/critic=none",
    )
    yield (
        parts.critic is None and "values" in wants,
        "algo/advantage=gae needs a critic: algo/critic=shared or algo/critic=separate",
    )
    yield (
        function_of(parts.surrogate) is sequence_ratio and is_of_tokens,
        "algo/surrogate=sequence_ratio has one ratio for a completion, and algo/advantage gives each token its own "
        "advantage: take one of the group advantages",
    )
    yield (
        is_likelihood and function_of(parts.surrogate) is not score_function,
        "algo/advantage=best_of_group and reward_weighted are weights of a likelihood: they need "
        "algo/surrogate=score_function",
    )
    yield (
        is_likelihood and parts.shaping.whiten_advantages,
        "algo.whiten_advantages would move the zero of a likelihood's weights: set it to false",
    )
    yield (
        parts.drawing.resample_zero_std > 0 and "group_size" not in wants,
        "algo.resample_zero_std refills groups without spread, which only advantages within the group need: set it "
        "to 0",
    )


def _of_updates(parts: Composition, setup: Setup) -> Iterator[Refusal]:
    """Invalid combinations of how a batch is drawn and trained on."""
    settings, drawing, updates, shaping = setup.settings, parts.drawing, parts.updates, parts.shaping
    samples = settings.prompts_per_step * settings.group_size
    is_in_parts = updates.minibatches > 1 or updates.target_kl is not None
    looks_at_whole_batch = is_in_parts or shaping.whiten_advantages or drawing.resample_zero_std > 0
    yield (
        updates.per_batch > 1 and function_of(parts.surrogate) is score_function,
        f"algo.epochs={updates.epochs} x algo.minibatches={updates.minibatches} needs a surrogate with a ratio "
        f"(algo/surrogate=clipped): after the first update the score function is off policy",
    )
    yield (
        updates.minibatches > 1 and samples % updates.minibatches > 0,
        f"algo.minibatches={updates.minibatches} must divide the {samples} samples of a step",
    )
    yield (
        updates.target_kl is not None and updates.per_batch == 1,
        "algo.target_kl ends the updates on a batch early, and there is only one: raise algo.epochs",
    )
    yield (
        drawing.is_bent and not drawing.allow_bent_sampling,
        "top_k, top_p and min_new_tokens bend the sampled distribution, so that the policy gradient is biased; set "
        "algo.allow_bent_sampling=true if that is what you want",
    )
    yield (
        setup.world_size > 1 and looks_at_whole_batch,
        "algo.whiten_advantages, algo.target_kl, algo.resample_zero_std and algo.minibatches look at the whole "
        "batch, and so far do so in one process only",
    )


def _try_parts(parts: Composition, advantage: CompletionAdvantage | TokenAdvantage, *, group_size: int) -> None:
    """Call each part once on zeros, so that a setting outside its range is refused here and not at the first step."""
    zeros, mask = torch.zeros(group_size, 2), torch.ones(group_size, 2, dtype=torch.bool)

    def try_advantage() -> Any:
        if isinstance(parts.advantage, Stateful):
            return None  # it would remember the zeros, and has checked its settings already
        if isinstance(advantage, TokenAdvantage):
            return advantage(zeros, mask=mask, values=zeros, group_size=group_size)
        return advantage(zeros[:, 0], greedy_rewards=zeros[:, 0], group_size=group_size)

    surrogate, aggregation = surrogate_of(parts), aggregation_of(parts)
    calls = {
        "advantage": try_advantage,
        "surrogate": lambda: surrogate(logprobs=zeros, old_logprobs=zeros, advantages=zeros, mask=mask),
        "aggregation": lambda: aggregation(x=zeros, mask=mask, num_tokens=1.0, num_sequences=1.0),
    }
    for axis, attempt in calls.items():
        try:
            attempt()
        except ValueError as error:
            raise ConfigError(f"algo.{axis}: {error}") from error
