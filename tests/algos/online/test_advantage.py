"""An advantage says by the type of its rewards whether it is of completions or of tokens, which have other tensors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from rlft.algos.online.advantage import CompletionAdvantage, TokenAdvantage, advantage_of
from rlft.core.errors import ConfigError
from rlft.core.paths import conf_directory
from rlft.functional import advantages
from rlft.functional.shapes import PerCompletion, PerToken
from tests.algos.micro import build, completions, eighths

CHOICES = sorted(path.stem for path in (conf_directory() / "algo" / "advantage").glob("*.yaml"))
OF_TOKENS = {"gae", "returns", "group_returns", "running_baseline"}
REWARDS = torch.tensor([1.0, 2.0, 4.0])


def of_completions(rewards: PerCompletion, *, group_size: int) -> Tensor:
    return rewards * group_size


def of_tokens(rewards: PerToken, mask: PerToken) -> Tensor:
    return rewards * mask


def untyped(rewards, mask):
    return rewards * mask


def of_tensors(rewards: Tensor) -> Tensor:
    return rewards


class Remembering:
    def __call__(self, rewards: PerToken, mask: PerToken) -> Tensor:
        return rewards * mask


def chosen(name: str) -> Any:
    """The part that conf/algo/advantage/<name>.yaml makes."""
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return instantiate(compose(overrides=[f"+algo/advantage={name}"]).algo.advantage)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (of_completions, CompletionAdvantage),
        (of_tokens, TokenAdvantage),
        (Remembering(), TokenAdvantage),
        (functools.partial(advantages.group_zscore, eps=0.5), CompletionAdvantage),
        (functools.partial(advantages.gae, gamma=1.0, lam=0.5), TokenAdvantage),
    ],
)
def test_the_type_of_its_rewards_says_which_it_is(part, kind):
    assert type(advantage_of(part)) is kind


@pytest.mark.parametrize("part", [untyped, of_tensors, lambda rewards: rewards, torch.zeros_like])
def test_one_that_does_not_say_what_its_rewards_are_is_refused_with_what_to_write(part):
    with pytest.raises(ConfigError) as refused:
        advantage_of(part)
    name = getattr(part, "__name__", "")
    assert str(refused.value) == (
        f"algo/advantage: {name} does not say what its rewards are: annotate its parameter rewards as "
        f"rlft.functional.shapes.PerCompletion ([B]) or PerToken ([B, T])"
    )


def test_one_whose_annotations_exist_for_type_checks_only_is_refused_by_the_name_that_is_not_there():
    def advantage(rewards: PerCompletion) -> Elsewhere:  # noqa: F821
        return rewards

    with pytest.raises(ConfigError, match=r"^algo/advantage: name 'Elsewhere' is not defined, which an annotation of"):
        advantage_of(advantage)


def test_one_of_completions_may_not_ask_for_what_only_tokens_have():
    def with_values(rewards: PerCompletion, values: PerToken) -> Tensor:
        return rewards

    def with_mask(rewards: PerCompletion, mask: PerToken) -> Tensor:
        return rewards

    for part, name in ((with_values, "values"), (with_mask, "mask")):
        with pytest.raises(ConfigError, match=rf"^algo/advantage: with_{name} asks for the tensor '{name}'.*there are"):
            advantage_of(part)
    with pytest.raises(ConfigError, match="asks for the tensor 'values'"):  # and so before anything is sampled
        build("ppo", parts={"advantage": with_values})


def test_one_of_tokens_may_not_ask_for_what_only_completions_have():
    def with_greedy(rewards: PerToken, greedy_rewards: PerCompletion) -> Tensor:
        return rewards

    with pytest.raises(ConfigError, match=r"with_greedy asks for the tensor 'greedy_rewards'.*there are rewards, mask"):
        advantage_of(with_greedy)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_says_what_it_is(name):
    assert isinstance(advantage_of(chosen(name)), TokenAdvantage if name in OF_TOKENS else CompletionAdvantage)


def test_each_is_called_with_what_it_names_and_the_groups_size():
    asked = advantage_of(of_completions)
    assert asked.part.names == {"rewards", "group_size"}
    assert asked(REWARDS, greedy_rewards=None, group_size=3).tolist() == [3, 6, 12]
    mask = torch.tensor([True, True, False])
    assert advantage_of(of_tokens)(REWARDS, mask=mask, values=None, group_size=3).tolist() == [1, 2, 0]
    greedy = advantage_of(advantages.greedy_baseline)
    assert greedy(REWARDS, greedy_rewards=torch.ones(3), group_size=1).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("annotation", "shape"), [(PerCompletion, [6]), (PerToken, [6, 5])], ids=["completions", "tokens"]
)
def test_a_composition_hands_over_rewards_of_that_shape(annotation, shape):
    seen: list[Tensor] = []

    def advantage(rewards) -> Tensor:
        seen.append(rewards)
        return torch.zeros_like(rewards)

    advantage.__annotations__["rewards"] = annotation
    batch = build("dr_grpo", parts={"advantage": advantage}).collect(1)
    (rewards,) = seen[1:]  # the first call tries the part on zeros
    assert list(rewards.shape) == shape
    of_rows = rewards if rewards.dim() == 1 else rewards.sum(dim=1)
    assert of_rows.tolist() == eighths(completions(batch))
    assert batch.values["advantages"].shape == batch.rows.completion_mask.shape
