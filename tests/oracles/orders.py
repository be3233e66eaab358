"""A bidirectional model's own distributions, listed one mask and one order at a time: slow and plain.

`ids` is a block whose first token is given; places count from 1, as indices into it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from rlft.models.gpt2 import GPT2

Places = tuple[int, ...]


@torch.no_grad()
def logprobs(policy: GPT2, ids: list[int], hidden: Places) -> list[list[float]]:
    """log p(v | what is shown) for each place of the block and each v of the vocabulary, [MASK] not among them."""
    row = [policy.vocab_size if i in hidden else x for i, x in enumerate(ids)]
    logits = policy(torch.tensor([row]))[0] @ policy.wte.weight[: policy.vocab_size].t()
    return logits.log_softmax(-1).tolist()


def masks(ids: list[int]) -> Iterator[Places]:
    """Every set of places to hide, the empty one first."""
    places = range(1, len(ids))
    return itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(len(ids)))


def hidden_nll(policy: GPT2, ids: list[int], hidden: Places) -> float:
    """-sum log p(x_i | shown) over the hidden places."""
    table = logprobs(policy, ids, hidden)
    return -sum(table[i][ids[i]] for i in hidden)


def expected_nll(policy: GPT2, ids: list[int], t: float) -> float:
    """sum_i E[-log p(x_i | shown)], place i hidden and each other place with probability t."""
    total = 0.0
    for i in range(1, len(ids)):
        for others in masks(ids):
            if i not in others:
                chance = t ** len(others) * (1 - t) ** (len(ids) - 2 - len(others))
                hidden = (*others, i)
                total -= chance * logprobs(policy, ids, hidden)[i][ids[i]]
    return total


def order_nlls(policy: GPT2, ids: list[int]) -> list[float]:
    """-log probability of the block when it is written one token at a time, for each order of the places."""
    nlls = []
    for order in itertools.permutations(range(1, len(ids))):
        steps = [logprobs(policy, ids, order[k:])[i][ids[i]] for k, i in enumerate(order)]
        nlls.append(-sum(steps))
    return nlls


def any_order_nll(policy: GPT2, ids: list[int]) -> float:
    """-log probability of the block when it is written in an order drawn at random."""
    nlls = order_nlls(policy, ids)
    return -math.log(sum(math.exp(-nll) for nll in nlls) / len(nlls))
