"""Runs the real `collect` and `loss` on completions that are given instead of sampled."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.algos.online.rollouts import Rollouts
from rlft.algos.samples import Samples
from rlft.core.batch import Batch, Denominators, Rows, pad
from rlft.core.metrics import Metrics
from rlft.data.prompts import Prompt
from rlft.models.scorer import Scorer
from rlft.rollout.engine import Rollout
from rlft.verify.enumerable import Completion, Task
from rlft.verify.formulas import Array, Sample

Group = tuple[Completion, ...]
CPU = torch.device("cpu")


class Listed(Rollouts):
    """Hands out given rollouts instead of sampling them, and scores them as sampled ones are scored."""

    def __init__(self, drawn: Rollouts) -> None:
        """`drawn` is the object that it replaces."""
        vars(self).update(vars(drawn))
        self.queue: deque[tuple[list[Prompt], Rollout]] = deque()  # one entry for each draw

    def _draw(self, index: int) -> Samples:
        prompts, rollout = self.queue.popleft()
        texts = self.run.tokenizer.decode_batch(rollout.completions())
        return self._scored(Samples(prompts, rollout, texts, self.group_size))


def rollout_of(task: Task, groups: tuple[Group, ...], logp: Array) -> Rollout:
    """Return a group of completions for each prompt as a rollout; `logp` [contexts, V] are the sampler's logprobs."""
    pairs = [(p, ids) for p, group in enumerate(groups) for ids in group]
    prompt_ids, prompt_mask = pad([list(ids) for ids in task.prompts], device=CPU)
    completion_ids, mask = pad([list(ids) for _, ids in pairs], device=CPU)
    rows = Rows(prompt_ids, prompt_mask.sum(1), torch.tensor([p for p, _ in pairs]), completion_ids, mask)
    logprobs = torch.zeros(mask.shape, dtype=torch.float64)
    for row, (p, ids) in enumerate(pairs):
        contexts = [task.places[task.prompts[p] + ids[:t]] for t in range(len(ids))]
        logprobs[row, : len(ids)] = torch.from_numpy(logp[contexts, list(ids)])
    return Rollout(rows, logprobs, ["stop"] * len(pairs))


def sample_of(task: Task, prompt: int, ids: Completion, *, greedy_reward: float = 0.0) -> Sample:
    """Return a completion in the form that the formulas read."""
    contexts = tuple(task.places[task.prompts[prompt] + ids[:t]] for t in range(len(ids)))
    at_end = [0.0] * (len(ids) - 1) + [task.reward(prompt, ids)]
    rewards = task.token_rewards(prompt, ids) if task.token_rewards else at_end
    return Sample(contexts, ids, tuple(rewards), greedy_reward)


def loss_of(algorithm: PolicyGradient, batch: Batch, *, update: int, metrics: Metrics | None = None) -> Tensor:
    """Return the loss of a whole batch at its update number `update`."""
    denominators = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
    scorer = Scorer(algorithm.run.policy, algorithm.head)
    return algorithm.loss(scorer, batch, denominators, metrics or Metrics(), update=update)
