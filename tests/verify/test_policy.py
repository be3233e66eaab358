"""The table policy is a language model like any other: engine, cache and scorer see the same distributions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlft.core.batch import Rows, pad
from rlft.core.errors import ConfigError
from rlft.models.scorer import Scorer
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from rlft.verify import exact
from rlft.verify.enumerable import endings, match, parity, token_count, two_prompts
from rlft.verify.policy import TabularPolicy

TASK = endings(((0,), (1, 2)), 4, 3)


def by_hand(policy: TabularPolicy, task, prompt: int, ids: tuple[int, ...], temperature: float) -> list[float]:
    """Logprobs of a completion's tokens, from the table's rows."""
    found = []
    for t, token in enumerate(ids):
        row = [z / temperature for z in policy.table[task.places[task.prompts[prompt] + ids[:t]]].tolist()]
        found.append(row[token] - math.log(sum(math.exp(z) for z in row)))
    return found


def test_probabilities_of_all_completions_are_those_of_the_table_and_add_up_to_one():
    policy = TASK.policy(seed=3, spread=1.0)
    logp = exact.logprobs(policy, TASK, temperature=0.7).detach()
    for p, (number, ids) in itertools.product(range(2), enumerate(TASK.completions)):
        assert float(logp[p, number]) == pytest.approx(sum(by_hand(policy, TASK, p, ids, 0.7)), rel=1e-12)
    assert logp.exp().sum(1).tolist() == pytest.approx([1.0, 1.0], rel=1e-12)
    table = exact.table(policy, TASK, temperature=0.7)
    torch.testing.assert_close(table, torch.log_softmax(policy.table / 0.7, -1), rtol=1e-12, atol=1e-13)


def test_the_scorer_and_the_sampler_see_the_table():
    policy = TASK.policy(seed=3, spread=1.0)
    drawn = generate(
        policy, [[0], [1, 2]], group_size=40, sampling=Sampling(3, 0.7), eos_id=3, seed=1
    )  # prompts of unequal length
    scores = Scorer(policy)(drawn.rows, temperature=0.7)
    assert len({len(ids) for ids in drawn.completions()}) == 3
    for row, ids in enumerate(drawn.completions()):
        wanted = by_hand(policy, TASK, row // 40, tuple(ids), 0.7)
        assert drawn.logprobs[row, : len(ids)].tolist() == pytest.approx(wanted, rel=1e-12)
        assert scores.logprobs[row, : len(ids)].tolist() == pytest.approx(wanted, rel=1e-12)


def test_a_context_that_the_table_does_not_have_is_nan_and_so_is_a_wrong_position():
    policy = TASK.policy(seed=3, spread=1.0)
    assert policy(torch.tensor([[1, 2, 0]])).isnan().all(-1).tolist() == [[True, False, False]]  # (1,) is no prompt
    assert policy(torch.tensor([[0]]), positions=torch.tensor([[1]])).isnan().all()
    prompt_ids, mask = pad([[2]], device=torch.device("cpu"))
    rows = Rows(prompt_ids, mask.sum(1), torch.tensor([0]), torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    assert Scorer(policy)(rows).logprobs.isnan().all()


def test_a_table_too_large_for_exact_numbers_is_refused():
    with pytest.raises(ConfigError, match="more contexts than float64 counts"):
        TabularPolicy([tuple([0] * 30)], torch.zeros(1, 9))
    with pytest.raises(ConfigError, match="no Hugging Face format"):
        TASK.policy(seed=0, spread=0.0).save_hf("nowhere")


@pytest.mark.parametrize(
    ("task", "completions", "contexts"),
    [
        (token_count(), 81, 40),
        (parity(), 81, 40),
        (two_prompts(), 27, 26),
        (TASK, 1 + 3 + 36, 2 * (1 + 3 + 9)),
        (match(((0,), (0, 0)), 2, 2), 3, 3),  # the second prompt is how the first goes on
    ],
)
def test_a_task_lists_every_completion_and_context_once(task, completions, contexts):
    assert len(task.completions) == len(set(task.completions)) == completions
    assert len(task.contexts) == len(set(task.contexts)) == contexts
    assert task.rewards.shape == (len(task.prompts), completions)
    assert torch.equal(task.rewards, task.rewards.float().double())  # what RewardSum keeps


def test_rewards_are_what_their_task_says():
    assert token_count().reward(0, (0, 1, 0, 2)) == 2.0
    assert parity().reward(0, (0, 0, 0, 2)) == 1.0 and parity().reward(0, (0, 1, 0, 2)) == 0.0
    assert [two_prompts().reward(p, (0, 0, 1)) for p in (0, 1)] == [2.0, 1.0]
    task = match(((0,),), 3, 3)
    assert [ids for ids in task.completions if task.reward(0, ids)] == [(0, 2), (1, 2)]


def test_the_likeliest_completion_takes_the_largest_logit_at_each_place():
    policy = TASK.policy(seed=3, spread=1.0)
    ids = TASK.likeliest(policy.table.detach().numpy(), 1)
    for t, token in enumerate(ids):
        assert token == int(policy.table[TASK.places[(1, 2, *ids[:t])]].argmax())
    assert ids in TASK.completions
