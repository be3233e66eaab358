"""Which parts go together: what makes no sense is refused, with the reason, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlft.algos.online.kl import KLPenalty
from rlft.algos.online.parts import Stateful, call, function_of, parameters
from rlft.core.errors import ConfigError
from rlft.functional.advantages import beta_normalized, no_advantage
from rlft.functional.surrogates import score_function, sequence_ratio
from rlft.functional.weights import best_of_group, reward_weighted


def check(
    *,
    advantage: Callable[..., Any],
    surrogate: Callable[..., Any],
    aggregation: Callable[..., Any],
    kl: KLPenalty,
    critic: Callable[..., Any] | None,
    has_reference: bool,
    is_reference_initial: bool = False,
    prompts_per_step: int,
    group_size: int,
    epochs: int,
    minibatches: int,
    target_kl: float | None,
    whiten_advantages: bool,
    entropy_coef: float,
    target_logprob_coef: float,
    resample_zero_std: int,
    world_size: int,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    allow_bent_sampling: bool = False,
    **_: Any,
) -> None:
    """Raise `ConfigError` for the first thing that makes no sense in a composition of online parts.

    `is_reference_initial` says that the reference is the policy as the run begins with it.
    """
    wants, updates, samples = parameters(advantage), epochs * minibatches, prompts_per_step * group_size
    is_likelihood = function_of(advantage) in (best_of_group, reward_weighted)
    is_score_function = function_of(surrogate) is score_function
    only_kl = function_of(advantage) is no_advantage and not entropy_coef  # no reward trains, and nothing beside it
    refused = (
        (
            kl.base_coef > 0 and not has_reference,
            "a KL penalty needs a reference: set reference=initial, or algo/kl=none",
        ),
        (
            only_kl and not kl.is_in_loss,
            f"algo/advantage=none trains by the KL in the loss alone, and there is none: take algo/kl=exact with "
            f"algo.kl.coef above 0 (it is {kl.base_coef:g}, in the {kl.where}), and a teacher by reference=checkpoint",
        ),
        (
            only_kl and is_reference_initial,
            "algo/advantage=none moves a student to its teacher, and the reference is the policy itself as the run "
            "begins: the KL has no gradient there, ever. Name a teacher: reference=checkpoint reference.path=DIR",
        ),
        (
            kl.is_in_reward and function_of(advantage) is beta_normalized,
            "algo/advantage=beta_normalized is for rewards of 0 and 1, and a KL in the reward makes others of them: "
            "take a KL in the loss (algo/kl=k3), or algo/kl=none",
        ),
        (
            target_logprob_coef != 0 and "mask" not in wants,
            f"algo.target_logprob_coef={target_logprob_coef} is added to the reward of each token, and this "
            f"algo/advantage compares whole completions: take returns, running_baseline, group_returns or gae, or set "
            f"it to 0",
        ),
        (
            "group_size" in wants and group_size < 2,
            f"group_size={group_size}: an advantage within the group needs at least 2 samples of a prompt; "
            f"algo=reinforce goes with one",
        ),
        (epochs < 1 or minibatches < 1, "algo.epochs and algo.minibatches must be at least 1"),
        (
            updates > 1 and is_score_function,
            f"algo.epochs={epochs} x algo.minibatches={minibatches} needs a surrogate with a ratio "
            f"(algo/surrogate=clipped): after the first update the score function is off policy",
        ),
        (
            minibatches > 1 and samples % minibatches > 0,
            f"algo.minibatches={minibatches} must divide the {samples} samples of a step",
        ),
        (
            critic is not None and "values" not in wants,
            "a critic needs algo/advantage=gae, the only advantage that reads its values; drop it by algo/critic=none",
        ),
        (
            critic is None and "values" in wants,
            "algo/advantage=gae needs a critic: algo/critic=shared or algo/critic=separate",
        ),
        (
            function_of(surrogate) is sequence_ratio and "mask" in wants,
            "algo/surrogate=sequence_ratio has one ratio for a completion, and algo/advantage gives each token its own "
            "advantage: take one of the group advantages",
        ),
        (
            is_likelihood and not is_score_function,
            "algo/advantage=best_of_group and reward_weighted are weights of a likelihood: they need "
            "algo/surrogate=score_function",
        ),
        (
            is_likelihood and whiten_advantages,
            "algo.whiten_advantages would move the zero of a likelihood's weights: set it to false",
        ),
        (
            resample_zero_std > 0 and "group_size" not in wants,
            "algo.resample_zero_std refills groups without spread, which only advantages within the group need: set it "
            "to 0",
        ),
        (
            target_kl is not None and updates == 1,
            "algo.target_kl ends the updates on a batch early, and there is only one: raise algo.epochs",
        ),
        (
            (top_k > 0 or top_p < 1.0 or min_new_tokens > 0) and not allow_bent_sampling,
            "top_k, top_p and min_new_tokens bend the sampled distribution, so that the policy gradient is biased; set "
            "algo.allow_bent_sampling=true if that is what you want",
        ),
        (
            prompts_per_step % world_size > 0,
            f"prompts_per_step={prompts_per_step} must be a multiple of the {world_size} processes",
        ),
        (
            world_size > 1 and (whiten_advantages or target_kl is not None or resample_zero_std > 0 or minibatches > 1),
            "algo.whiten_advantages, algo.target_kl, algo.resample_zero_std and algo.minibatches look at the whole "
            "batch, and so far do so in one process only",
        ),
    )
    for applies, reason in refused:
        if applies:
            raise ConfigError(reason)
    _try_parts(advantage, surrogate, aggregation, group_size=group_size)


def _try_parts(
    advantage: Callable[..., Any], surrogate: Callable[..., Any], aggregation: Callable[..., Any], *, group_size: int
) -> None:
    """Call each part once on zeros, so that a setting outside its range is refused here and not at the first step."""
    zeros, mask = torch.zeros(group_size, 2), torch.ones(group_size, 2, dtype=torch.bool)
    tokens, values = "mask" in parameters(advantage), {"values": zeros, "mask": mask, "group_size": group_size}
    rewards = zeros if tokens else zeros[:, 0]
    calls = {
        "advantage": lambda: call(advantage, rewards=rewards, greedy_rewards=zeros[:, 0], **values),
        "surrogate": lambda: call(surrogate, logprobs=zeros, old_logprobs=zeros, advantages=zeros, mask=mask),
        "aggregation": lambda: call(aggregation, x=zeros, mask=mask, num_tokens=1.0, num_sequences=1.0),
    }
    for axis, attempt in calls.items():
        if axis == "advantage" and isinstance(advantage, Stateful):
            continue  # it would remember the zeros, and has checked its settings already
        try:
            attempt()
        except ValueError as error:
            raise ConfigError(f"algo.{axis}: {error}") from error
