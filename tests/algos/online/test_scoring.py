from __future__ import annotations

import pytest
import torch

from rlft.algos.online.scoring import critic_values, frozen_scores
from rlft.core.batch import Batch
from rlft.models.gpt2 import GPT2
from rlft.models.heads import Critic
from tests.models.tiny import random_ids, rows_of, shaken, tiny


@pytest.mark.parametrize("limit", [None, 2])
def test_a_critics_values_are_those_beside_the_policys_scores_without_running_the_policy(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny()
    critic = shaken(Critic(policy), 5).train()
    batch = Batch(rows_of(random_ids(1, [3, 1, 6]), random_ids(2, [5, 2, 7, 1]), [0, 0, 1, 2]))
    limits = {"max_rows": limit, "max_tokens": None}
    expected = frozen_scores(policy, batch, temperature=1.0, head=critic, **limits).values
    forwarded, forward = [], GPT2.forward
    monkeypatch.setattr(GPT2, "forward", lambda self, *a, **k: forwarded.append(self) or forward(self, *a, **k))
    values = critic_values(critic, batch, **limits)
    assert expected is not None and expected.abs().max() > 0.1
    torch.testing.assert_close(values, expected, atol=1e-12, rtol=0)
    assert set(map(id, forwarded)) == {id(critic.trunk)}
    assert critic.training and critic.trunk.training and not values.requires_grad
