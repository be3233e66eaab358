"""Checks that the chosen parts of an online algorithm fit together, before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch

from rlft.algos.base import Setup
from rlft.algos.online.advantage import CompletionAdvantage, TokenAdvantage, advantage_of
from rlft.algos.online.composition import Composition
from rlft.algos.parts import Part, Stateful, composed, function_of
from rlft.core.errors import ConfigError
from rlft.functional.advantages import beta_normalized, no_advantage
from rlft.functional.surrogates import score_function, sequence_ratio
from rlft.functional.weights import best_of_group, reward_weighted

SURROGATE_TENSORS = ("logprobs", "old_logprobs", "advantages", "mask")
AGGREGATION_TENSORS, AGGREGATION_COUNTS = ("x", "mask"), ("num_tokens", "num_sequences")


def surrogate_of(parts: Composition) -> Part:
    """Return the surrogate, checked: from logprobs and advantages [B, T] to each token's loss and statistics."""
    return composed(parts.surrogate, where="algo/surrogate", tensors=SURROGATE_TENSORS)


def aggregation_of(parts: Composition) -> Part:
    """Return the aggregation, checked: from tokens' losses x [B, T] to a scalar."""
    where, tensors = "algo/aggregation", AGGREGATION_TENSORS
    return composed(parts.aggregation, where=where, tensors=tensors, from_run=AGGREGATION_COUNTS)


def validate(parts: Composition, setup: Setup) -> None:
    """Raise `ConfigError` for the first thing that makes no sense in a composition of online parts."""
    settings, drawing, updates, kl = setup.settings, parts.drawing, parts.updates, parts.kl
    target_logprob_coef, group_size = parts.shaping.target_logprob_coef, settings.group_size
    samples = settings.prompts_per_step * group_size
    advantage = advantage_of(parts.advantage)
    is_of_tokens, wants = isinstance(advantage, TokenAdvantage), advantage.part.names
    is_likelihood = function_of(parts.advantage) in (best_of_group, reward_weighted)
    is_score_function = function_of(parts.surrogate) is score_function
    # No reward trains, and nothing beside it.
    only_kl = function_of(parts.advantage) is no_advantage and not parts.entropy.entropy_coef
    looks_at_whole_batch = (
        parts.shaping.whiten_advantages
        or updates.target_kl is not None
        or drawing.resample_zero_std > 0
        or updates.minibatches > 1
    )
    refused = (
        (
            kl.base_coef > 0 and not setup.has_reference,
            "a KL penalty needs a reference: set reference=initial, or algo/kl=none",
        ),
        (
            only_kl and not kl.is_in_loss,
            f"algo/advantage=none trains by the KL in the loss alone, and there is none: take algo/kl=exact with "
            f"algo.kl.coef above 0 (it is {kl.base_coef:g}, in the {kl.where}), and a teacher by reference=checkpoint",
        ),
        (
            only_kl and setup.is_reference_initial,
            "algo/advantage=none moves a student to its teacher, and the reference is the policy itself as the run "
            "begins: the KL has no gradient there, ever. Name a teacher: reference=checkpoint reference.path=DIR",
        ),
        (
            kl.is_in_reward and function_of(parts.advantage) is beta_normalized,
            "algo/advantage=beta_normalized is for rewards of 0 and 1, and a KL in the reward makes others of them: "
            "take a KL in the loss (algo/kl=k3), or algo/kl=none",
        ),
        (
            target_logprob_coef != 0 and not is_of_tokens,
            f"algo.target_logprob_coef={target_logprob_coef} is added to the reward of each token, and this "
            f"algo/advantage compares whole completions: take returns, running_baseline, group_returns or gae, or set "
            f"it to 0",
        ),
        (
            "group_size" in wants and group_size < 2,
            f"group_size={group_size}: an advantage within the group needs at least 2 samples of a prompt; "
            f"algo=reinforce goes with one",
        ),
        (
            updates.per_batch > 1 and is_score_function,
            f"algo.epochs={updates.epochs} x algo.minibatches={updates.minibatches} needs a surrogate with a ratio "
            f"(algo/surrogate=clipped): after the first update the score function is off policy",
        ),
        (
            updates.minibatches > 1 and samples % updates.minibatches > 0,
            f"algo.minibatches={updates.minibatches} must divide the {samples} samples of a step",
        ),
        (
            parts.critic is not None and "values" not in wants,
            "a critic needs algo/advantage=gae, the only advantage that reads its values; drop it by algo/critic=none",
        ),
        (
            parts.critic is None and "values" in wants,
            "algo/advantage=gae needs a critic: algo/critic=shared or algo/critic=separate",
        ),
        (
            function_of(parts.surrogate) is sequence_ratio and is_of_tokens,
            "algo/surrogate=sequence_ratio has one ratio for a completion, and algo/advantage gives each token its own "
            "advantage: take one of the group advantages",
        ),
        (
            is_likelihood and not is_score_function,
            "algo/advantage=best_of_group and reward_weighted are weights of a likelihood: they need "
            "algo/surrogate=score_function",
        ),
        (
            is_likelihood and parts.shaping.whiten_advantages,
            "algo.whiten_advantages would move the zero of a likelihood's weights: set it to false",
        ),
        (
            drawing.resample_zero_std > 0 and "group_size" not in wants,
            "algo.resample_zero_std refills groups without spread, which only advantages within the group need: set it "
            "to 0",
        ),
        (
            updates.target_kl is not None and updates.per_batch == 1,
            "algo.target_kl ends the updates on a batch early, and there is only one: raise algo.epochs",
        ),
        (
            drawing.is_bent and not drawing.allow_bent_sampling,
            "top_k, top_p and min_new_tokens bend the sampled distribution, so that the policy gradient is biased; set "
            "algo.allow_bent_sampling=true if that is what you want",
        ),
        (
            settings.prompts_per_step % setup.world_size > 0,
            f"prompts_per_step={settings.prompts_per_step} must be a multiple of the {setup.world_size} processes",
        ),
        (
            setup.world_size > 1 and looks_at_whole_batch,
            "algo.whiten_advantages, algo.target_kl, algo.resample_zero_std and algo.minibatches look at the whole "
            "batch, and so far do so in one process only",
        ),
    )
    for applies, reason in refused:
        if applies:
            raise ConfigError(reason)
    _try_parts(parts, advantage, group_size=group_size)


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
