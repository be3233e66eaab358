"""Parts that make no sense together are refused with the reason, most of them before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlft import build as build_module
from rlft.algos.base import Setup
from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.algos.online.validate import validate
from rlft.config import root_settings
from rlft.core.errors import ConfigError
from tests.algos.micro import build
from tests.builders import algorithm_node, reward_sum


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("remax", ("algo/critic=shared",), "a critic needs algo/advantage=gae"),
        ("ppo", ("algo/critic=none",), "needs a critic"),
        ("gspo", ("algo/advantage=returns",), "one ratio for a completion"),
        ("raft", ("algo/surrogate=clipped",), "weights of a likelihood"),
        ("rwr", ("algo.whiten_advantages=true",), "would move the zero"),
        ("reinforce", ("algo.resample_zero_std=2",), "refills groups without spread"),
        ("grpo", ("algo.target_kl=0.1",), "there is only one"),
        ("ppo", ("algo.minibatches=4",), "must divide the 6 samples"),
        ("rloo", ("algo.minibatches=2",), "needs a surrogate with a ratio"),
        ("distill", ("algo.kl.coef=0",), r"trains by the KL in the loss alone, .* above 0 \(it is 0, in the loss\)"),
        ("distill", ("algo/kl=in_reward",), "trains by the KL in the loss alone"),
        ("bnpo", ("algo/kl=in_reward",), "for rewards of 0 and 1, and a KL in the reward"),
        ("grpo", ("algo.target_logprob_coef=0.1",), "is added to the reward of each token, .* take returns"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(name, *overrides)


def test_a_student_is_refused_as_its_own_teacher_unless_something_else_moves_it():
    def check(*overrides: str, is_reference_initial: bool) -> None:
        settings = build_module._parts(algorithm_node("distill", overrides)).keywords
        setup = Setup(root_settings(), has_reference=True, is_reference_initial=is_reference_initial)
        PolicyGradient.check(setup, **settings)

    check(is_reference_initial=False)
    check("algo.entropy_coef=0.1", is_reference_initial=True)
    with pytest.raises(ConfigError, match=r"the reference is the policy itself as the run begins.*=checkpoint"):
        check(is_reference_initial=True)


# What a batch of its own shows first.


def test_rewards_that_an_advantage_is_not_for_are_refused_on_the_first_batch_with_the_value():
    algorithm = build("bnpo", rewards=reward_sum(lambda completion_ids, **_: [0.0, 1.0, None, 0.25, 1.0, 0.5]))
    with pytest.raises(ConfigError, match=r"algo/advantage cannot use .* rewards of 0 and 1, got 0\.25; for others"):
        algorithm.collect(0)


def test_targets_that_the_data_does_not_have_are_refused_before_anything_is_sampled():
    with pytest.raises(ConfigError, match=r"list:\d does not have \(its columns: number\): .*data=contexts"):
        build("reinforce", "algo.target_logprob_coef=0.5")


def test_an_aggregation_without_a_count_of_the_whole_batch_is_refused():
    def mean(x, mask):
        return (x * mask).sum() / mask.sum()

    node = algorithm_node("grpo")
    parts = replace(build_module._parts(node).keywords["parts"], aggregation=mean)
    with pytest.raises(ConfigError, match="must take num_tokens or num_sequences, counts of the whole batch"):
        validate(parts, Setup(root_settings(), has_reference=True))
