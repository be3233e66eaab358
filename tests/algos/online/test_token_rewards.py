"""Dense rewards in a policy gradient: contexts from text, credit for each token, and the text's own next token."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from rlft.algos.online.probe import TextProbe
from rlft.core.errors import ConfigError
from rlft.data.contexts import Contexts
from rlft.data.prompts import Prompt
from rlft.rewards.next_token import NextToken
from tests.algos.micro import build, completions, frozen_distributions
from tests.builders import ALPHABET, TOKENIZER, FixedPrompts, FixedText, reward_sum, tiny
from tests.oracles.loops import discounted_returns

BLOCKS = torch.arange(60).view(6, 10) % 11


def contexts(context: int = 3, horizon: int = 4, **settings: int) -> Contexts:
    made = Contexts(None, tokenizer=TOKENIZER, context=context, horizon=horizon, block_size=9, **settings)
    made.text = FixedText(BLOCKS, BLOCKS[:2])
    return made


def dense(completion_ids, **_):
    return [[(i % 3) / 4 for i in ids] for ids in completion_ids]


def test_contexts_carry_the_tokens_that_follow():
    prompts = contexts().batch(0, size=3, seed=5)
    rows = FixedText(BLOCKS, BLOCKS).batch(0, size=3, seed=5).tolist()
    assert [p.ids for p in prompts] == [row[:3] for row in rows]
    assert [p.columns["target_ids"] for p in prompts] == [row[3:7] for row in rows]
    assert [p.text for p in prompts] == ["".join(ALPHABET[i] for i in row[:3]) for row in rows]
    assert [p.ids for p in contexts().prompts("validation")] == BLOCKS[:2, :3].tolist()


def test_contexts_of_drawn_lengths_are_a_function_of_seed_and_step_and_reach_every_length():
    data = contexts(context=5, horizon=2, min_context=2)
    assert data.batch(1, size=6, seed=0) == data.batch(1, size=6, seed=0)
    for prompt in data.batch(1, size=6, seed=0):
        first, *_, last = prompt.ids + prompt.columns["target_ids"]
        assert len(prompt.columns["target_ids"]) == 2 and (last - first) % 11 == len(prompt.ids) + 1  # ids count up
    assert {len(p.ids) for step in range(9) for p in data.batch(step, size=6, seed=0)} == {2, 3, 4, 5}
    with pytest.raises(ConfigError, match=r"min_context=6 must be between 1 and data\.context=5"):
        contexts(context=5, min_context=6)


def test_contexts_that_fit_no_block_are_refused():
    contexts(context=6, horizon=4)
    with pytest.raises(ConfigError, match=r"at most data\.block_size \+ 1 = 10"):
        contexts(context=7, horizon=4)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_advantages_of_token_rewards_equal_a_naive_loop(gamma):
    algorithm = build("token_rloo", f"algo.advantage.gamma={gamma}", rewards=reward_sum(dense))
    batch = algorithm.collect(1)
    mask, ids = batch.rows.completion_mask, completions(batch)
    width = mask.shape[1]
    rewards = [[*row, *[0.0] * (width - len(row))] for row in dense(ids)]
    returns = discounted_returns(rewards, mask.tolist(), gamma)
    for i in range(6):
        for t in range(width):
            others = [returns[j][t] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i and mask[j, t]]
            expected = returns[i][t] - (sum(others) / len(others) if others else 0.0) if mask[i, t] else 0.0
            assert float(batch.values["advantages"][i, t]) == pytest.approx(expected, abs=1e-12)


def test_a_completions_reward_stays_at_its_last_token():
    algorithm = build("reinforce", "algo.advantage.gamma=0")
    batch = algorithm.collect(1)
    for row, mask in zip(batch.values["advantages"], batch.rows.completion_mask, strict=True):
        n = int(mask.sum())
        assert row[: n - 1].tolist() == [0.0] * (n - 1) and float(row[n - 1]) != 0


def test_the_logprob_of_the_texts_own_token_is_added_to_each_tokens_reward():
    targets = [[1, 2], [3, 4, 5, 6, 7, 8]]  # shorter and longer than the completions
    prompts = [
        Prompt(t, TOKENIZER.encode(t), {"target_ids": ids}, t) for t, ids in zip(("abc", "d"), targets, strict=True)
    ]
    data = FixedPrompts(())
    data._prompts = prompts
    algorithm = build(
        "reinforce", "algo.advantage.gamma=0", "algo.target_logprob_coef=0.5", rewards=reward_sum(NextToken()),
        data=data,
    )  # fmt: skip
    batch = algorithm.collect(0)
    order = [prompts[0], prompts[1]] if int(batch.rows.prompt_lengths[0]) == 3 else [prompts[1], prompts[0]]
    for i, ids in enumerate(completions(batch)):
        wanted = order[i // 3].columns["target_ids"]
        logp, _ = frozen_distributions(algorithm.run.policy, batch, i, 0.8)
        for t, token in enumerate(ids):
            expected = float(token == wanted[t]) + 0.5 * float(logp[t, wanted[t]]) if t < len(wanted) else 0.0
            assert float(batch.values["advantages"][i, t]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_probe_is_the_loss_of_a_plain_forward():
    data, policy = contexts(), tiny(3, spread=0.2).double()
    metrics = TextProbe(max_blocks=2)(policy, None, data, device=torch.device("cpu"))
    logp = torch.log_softmax(policy(BLOCKS[:2, :-1]) @ policy.head_weight.t(), -1)
    expected = -logp.gather(2, BLOCKS[:2, 1:, None]).mean().item()
    assert metrics == {
        "eval/loss": pytest.approx(expected, rel=1e-12),
        "eval/perplexity": pytest.approx(math.exp(expected)),
    }
    with pytest.raises(ConfigError, match="data=contexts"):
        TextProbe()(policy, None, SimpleNamespace(), device=torch.device("cpu"))
