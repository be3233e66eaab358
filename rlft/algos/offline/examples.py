"""What the algorithms on given examples (pairs, labels, completions) share: batches, evaluation, checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlft.algos.base import NOT_EVALUATED, Algorithm, Evaluation
from rlft.core.batch import Batch, Denominators, Rows, pad
from rlft.core.errors import ConfigError, DataError
from rlft.core.metrics import Means
from rlft.data.examples import Example, ExampleData, example_lengths
from rlft.data.source import holds_out
from rlft.models.base import CausalLM
from rlft.models.scorer import Scorer
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer

EVAL_SEED = 0  # of the samples, the same at every evaluation of every run
NUM_SAMPLES = 5


class OnExamples(Algorithm):
    """A mean over examples of a loss that each has by itself; the evaluation is that loss on held-out examples.

    A subclass says how examples become a batch (`rows_per_unit` rows for each) and what their losses are.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        per_step: examples in an optimizer batch, over all ranks.
        num_held_out: held-out examples of an evaluation; None for all of them.
        micro_batch, micro_batch_tokens: what one forward without a gradient may hold.
    """

    objective = ("eval/loss", "min")

    def __init__(
        self,
        *,
        policy: CausalLM,
        data: ExampleData,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        rank: int,
        world_size: int,
        per_step: int,
        num_held_out: int | None,
        micro_batch: int | None,
        micro_batch_tokens: int | None,
    ) -> None:
        check_room(data, context_length=policy.context_length)
        self.policy, self.data, self.seed, self.device, self.autocast = policy, data, seed, device, autocast
        self.rank, self.world_size, self.per_step, self.num_held_out = rank, world_size, per_step, num_held_out
        self.limits: dict[str, Any] = {"max_rows": micro_batch, "max_tokens": micro_batch_tokens}

    @abstractmethod
    def make_batch(self, examples: list[Example]) -> Batch:
        """Return the examples as rows, with all that their losses need; called without a gradient."""

    @abstractmethod
    def losses(self, scorer: Scorer, batch: Batch, means: Means, *, prefix: str) -> Tensor:
        """Return the loss of each example, and add its statistics to `means` under names that begin with `prefix`."""

    def collect(self, batch_index: int) -> Batch:
        examples = self.data.batch(batch_index, size=self.per_step, seed=self.seed)
        return self.make_batch(examples[self.rank :: self.world_size])

    def loss(self, scorer: Scorer, batch: Batch, totals: Denominators, means: Means, *, update: int) -> Tensor:
        losses = self.losses(scorer, batch, means, prefix="")
        return losses.sum() / (totals.num_sequences / batch.rows_per_unit)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        means, scorer = Means(), Scorer(self.policy, self.head)
        batch = self.make_batch(held_out(self.data, self.num_held_out))
        for micro in batch.micro_batches(**self.limits):
            with self.autocast():
                means.add("eval/loss", self.losses(scorer, micro, means, prefix="eval/"))
        return Evaluation(means.local(), self.samples())

    def samples(self) -> list[dict]:
        """Return what an evaluation shows, rows of samples.jsonl."""
        return []

    @property
    def is_evaluated(self) -> bool:
        return holds_out(self.data)

    def plan(self) -> list[tuple[str, str]]:
        held = f"{len(held_out(self.data, self.num_held_out)):,}" if self.is_evaluated else NOT_EVALUATED
        return [("examples per step", f"{self.per_step:,}"), ("held-out examples", held)] + [
            (f"data: {name}", f"{count:,}") for name, count in self.data.counts.items()
        ]


def check_sizes(*, setting: str, per_step: int, at_least: int, world_size: int) -> None:
    """Raise `ConfigError` for a batch that is too small, or that the ranks cannot share evenly."""
    if per_step < at_least or per_step % world_size:
        raise ConfigError(
            f"{setting}={per_step} must be at least {at_least}, and a multiple of the {world_size} processes"
        )


def check_held_out(*, setting: str, count: int | None, at_least: int = 1) -> None:
    """Raise `ConfigError` for an evaluation on fewer held-out examples than tell anything; None stands for all."""
    if count is not None and count < at_least:
        raise ConfigError(f"{setting}={count} must be at least {at_least}, or null for all held-out ones")


def check_room(data: ExampleData, *, context_length: int) -> None:
    """Raise `ConfigError` for the longest example, where the model's context cannot take it."""
    splits = [data.examples(split) for split in ("train", "validation")]
    lengths = np.concatenate([example_lengths(examples) for examples in splits])
    if len(lengths) and lengths.max() > context_length:
        number = int(lengths.argmax())
        longest = splits[0][number] if number < len(splits[0]) else splits[1][number - len(splits[0])]
        raise ConfigError(
            f"{longest.prompt.where}: {longest.num_tokens} tokens do not fit the model's context of {context_length}: "
            f"leave long examples out by data.max_tokens={context_length} data.on_unusable=skip"
        )


def held_out(data: ExampleData, count: int | None) -> list[Example]:
    """Return the first `count` validation examples (None: all); raises `DataError` where there is none."""
    examples = list(data.examples("validation")[:count])
    if not examples:
        raise DataError(
            "the validation split has no example to evaluate on: give more data, a larger data.source.validation, or "
            "data.source.validation=0 to train without evaluation"
        )
    return examples


def completion_rows(examples: list[Example], *, device: torch.device) -> Rows:
    """Return each example's completions as rows of one shared prompt; examples have equally many."""
    num = len(examples[0].completions)
    return _rows(examples, [ids for example in examples for ids in example.completions], num, device)


def whole_rows(examples: list[Example], *, device: torch.device) -> Rows:
    """Return rows with one counted place, behind the last token: the state before it has read the whole text.

    An example without completions is one row; another has a row for each, and they share the prompt.
    """
    num = max(1, len(examples[0].completions))
    texts = [[*ids, 0] for example in examples for ids in example.completions or ([],)]
    rows = _rows(examples, texts, num, device)
    last = torch.tensor([len(ids) for ids in texts], device=device)[:, None] - 1
    places = torch.arange(rows.completion_ids.shape[1], device=device)
    return Rows(rows.prompt_ids, rows.prompt_lengths, rows.prompt_of_row, rows.completion_ids, places[None] == last)


def _rows(examples: list[Example], completions: list[list[int]], num: int, device: torch.device) -> Rows:
    prompt_ids, prompt_mask = pad([example.prompt.ids for example in examples], device=device)
    completion_ids, completion_mask = pad(completions, device=device)
    prompt_of_row = torch.arange(len(examples), device=device).repeat_interleave(num)
    return Rows(prompt_ids, prompt_mask.sum(dim=1), prompt_of_row, completion_ids, completion_mask)


@torch.no_grad()
def summed_logprobs(model: CausalLM, batch: Batch, *, limits: dict[str, Any], temperature: float = 1.0) -> Tensor:
    """Return log pi(completion | prompt) of each row [B], with the model in evaluation mode."""
    was_training = model.training
    scorer = Scorer(model).eval()
    micros = batch.micro_batches(**limits)
    sums = [scorer(micro.rows, temperature=temperature).logprobs.sum(dim=1) for micro in micros]
    model.train(was_training)
    return torch.cat(sums)


def show_samples(
    policy: CausalLM, tokenizer: Tokenizer, examples: list[Example], *, sampling: Sampling, device: torch.device
) -> list[dict]:
    """Return the policy's own completions of the first prompts, as rows of samples.jsonl."""
    prompts = [example.prompt for example in examples[:NUM_SAMPLES]]
    rollout = generate(
        policy, [prompt.ids for prompt in prompts], group_size=1, sampling=sampling, eos_id=tokenizer.eos_id,
        seed=EVAL_SEED, stream="eval", device=device,
    )  # fmt: skip
    texts = tokenizer.decode_batch(rollout.completions())
    return [{"prompt": prompt.text, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]
