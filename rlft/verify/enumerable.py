"""Tasks whose completions can all be listed, so that probabilities, rewards and the best policy are known exactly.

A task uses the real tokenizer, prompts and rewards, so that it measures the code that runs use.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlft.core.rng import generator
from rlft.data.prompts import PromptData
from rlft.data.source import Row
from rlft.rewards.compose import RewardOutput, RewardSum
from rlft.text.characters import CharacterTokenizer, characters
from rlft.verify.policy import TabularPolicy

Completion = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Prompts, their possible completions, and the rewards of these.

    Arguments:
        prompts: ids of each prompt, none twice.
        vocab_size: V; ids 0, 1, 2, … are the letters "abc…".
        length: T, the largest number of tokens in a completion.
        ends: whether id V - 1 is the end token; if not, every completion has T tokens.
        reward: called with (index of the prompt, completion with its end token); its values are exact in float32.
        token_rewards: one reward for each token, with the sum `reward`; None: the whole reward is at the last token.
    """

    prompts: tuple[Completion, ...]
    vocab_size: int
    length: int
    ends: bool
    reward: Callable[[int, Completion], float]
    token_rewards: Callable[[int, Completion], list[float]] | None = None

    @functools.cached_property
    def completions(self) -> list[Completion]:
        """Every completion, N of them, in the order of their ids."""
        return [ids for ids in _prefixes(self, self.length) if len(ids) == self.length or self._has_ended(ids)]

    @functools.cached_property
    def contexts(self) -> list[Completion]:
        """All that can precede a token of a completion (prompt and tokens so far), prompt by prompt, short ones first.

        A prompt that is the beginning of another one shares contexts with it, as in any language model.
        """
        openings = [ids for ids in _prefixes(self, self.length - 1) if not self._has_ended(ids)]
        return list(dict.fromkeys(prompt + opening for prompt in self.prompts for opening in openings))

    @functools.cached_property
    def places(self) -> dict[Completion, int]:
        """The row of each context in a table."""
        return {context: row for row, context in enumerate(self.contexts)}

    @functools.cached_property
    def rewards(self) -> torch.Tensor:
        """[P, N] float64."""
        rows = [[self.reward(p, ids) for ids in self.completions] for p in range(len(self.prompts))]
        return torch.tensor(rows, dtype=torch.float64)

    @functools.cached_property
    def tokenizer(self) -> CharacterTokenizer:
        """One letter for each id; the end token is the last id, or one beyond the vocabulary where nothing ends."""
        return characters(alphabet="".join(chr(ord("a") + i) for i in range(self.vocab_size - self.ends)))

    def likeliest(self, table: np.ndarray, prompt: int) -> Completion:
        """Return the greedy completion under logits [contexts, V]."""
        ids: Completion = ()
        while len(ids) < self.length and not self._has_ended(ids):
            ids += (int(table[self.places[self.prompts[prompt] + ids]].argmax()),)
        return ids

    def policy(self, *, seed: int, spread: float) -> TabularPolicy:
        """Return a policy with logits from N(0, spread^2), a pure function of the seed; spread 0 is uniform."""
        noise = generator(seed, "verify/table").standard_normal((len(self.contexts), self.vocab_size))
        return TabularPolicy(self.contexts, spread * torch.from_numpy(noise))

    def data(self, *, eval_copies: int = 1) -> PromptData:
        """Return the prompts as a run reads them; the evaluation has each of them `eval_copies` times."""
        return PromptData(_Prompts(self, eval_copies), tokenizer=self.tokenizer)

    def reward_sum(self) -> RewardSum:
        score = self.token_rewards or self.reward

        def reward(completion_ids: list[Completion], number: list[int], **_: Any) -> list:
            return [score(p, tuple(ids)) for p, ids in zip(number, completion_ids, strict=True)]

        return ExactRewards({"task": reward}, weights={"task": 1.0}, timeouts={"task": 60.0})

    def _has_ended(self, ids: Completion) -> bool:
        return self.ends and ids[-1:] == (self.vocab_size - 1,)


class ExactRewards(RewardSum):
    """Totals in float64, so that the only rounding is that of the verified code."""

    def __call__(self, **keywords: Any) -> RewardOutput:
        made = super().__call__(**keywords)
        return replace(made, total=made.total.double())


class _Prompts:
    """A task's prompts as a source of rows."""

    def __init__(self, task: Task, eval_copies: int) -> None:
        texts = task.tokenizer.decode_batch(task.prompts)
        self._rows = [Row(text, {"number": p}, f"prompt:{p}") for p, text in enumerate(texts)]
        self._eval_copies = eval_copies
        self.counts: dict[str, int] = {}

    def rows(self, split: str) -> list[Row]:
        return self._rows * (1 if split == "train" else self._eval_copies)


def _prefixes(task: Task, length: int) -> list[Completion]:
    """Return every sequence of at most `length` tokens in which nothing follows an end token, the empty one first."""
    found: list[Completion] = [()]
    layer: list[Completion] = [()]
    for _ in range(length):
        layer = [(*ids, v) for ids in layer if not task._has_ended(ids) for v in range(task.vocab_size)]
        found += layer
    return found


def token_count(vocab_size: int = 3, length: int = 4) -> Task:
    """A dense reward: 1 for each token 0. The best policy has p(0) proportional to exp(1/beta) at every position."""

    def of_tokens(_: int, ids: Completion) -> list[float]:
        return [float(token == 0) for token in ids]

    return Task(((0,),), vocab_size, length, False, lambda _, ids: float(ids.count(0)), of_tokens)


def parity(vocab_size: int = 3, length: int = 4) -> Task:
    """A sparse reward: 1 if token 0 occurs an odd number of times, which the last token decides."""
    return Task(((0,),), vocab_size, length, False, lambda _, ids: float(ids.count(0) % 2))


def match(prompts: tuple[Completion, ...], vocab_size: int, length: int) -> Task:
    """A sparse reward and unequal lengths: 1 if the completion ends after exactly one token, else 0."""
    return Task(prompts, vocab_size, length, True, lambda _, ids: float(len(ids) == 2 and ids[1] == vocab_size - 1))


def endings(prompts: tuple[Completion, ...], vocab_size: int, length: int, *, seed: int = 0) -> Task:
    """Completions may end early; random rewards in 64ths, for each prompt and completion."""
    return Task(prompts, vocab_size, length, True, _table(prompts, vocab_size, length, seed))


def dense(prompts: tuple[Completion, ...], vocab_size: int, length: int, *, seed: int = 0) -> Task:
    """Completions may end early; random rewards in 64ths for each prompt, position and token."""
    drawn = generator(seed, "verify/dense").integers(-64, 65, (len(prompts), length, vocab_size)) / 64

    def of_tokens(prompt: int, ids: Completion) -> list[float]:
        return [float(drawn[prompt, t, token]) for t, token in enumerate(ids)]

    return Task(prompts, vocab_size, length, True, lambda p, ids: sum(of_tokens(p, ids)), of_tokens)


def random_table(vocab_size: int, length: int, *, seed: int = 0) -> Task:
    """Completions of one length with random rewards in 64ths."""
    prompts = ((0,),)
    return Task(prompts, vocab_size, length, False, _table(prompts, vocab_size, length, seed))


def two_prompts(vocab_size: int = 3, length: int = 3) -> Task:
    """Two prompts with different optima: the reward counts token 0 after the first, token 1 after the second."""
    return Task(((0,), (1, 2)), vocab_size, length, False, lambda p, ids: float(ids.count(p)))


def _table(
    prompts: tuple[Completion, ...], vocab_size: int, length: int, seed: int
) -> Callable[[int, Completion], float]:
    sequences = [ids for n in range(1, length + 1) for ids in itertools.product(range(vocab_size), repeat=n)]
    drawn = generator(seed, "verify/rewards").integers(-64, 65, (len(prompts), len(sequences))) / 64
    values = [dict(zip(sequences, row.tolist(), strict=True)) for row in drawn]
    return lambda p, ids: values[p][ids]
