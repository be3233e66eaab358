"""What the algorithms on given examples (pairs, labels, completions) share: batches, evaluation, checks."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rlft.algos.base import NOT_EVALUATED, Algorithm, Evaluation, Run
from rlft.algos.samples import NUM_SHOWN, draw
from rlft.core.batch import Batch, Denominators, Rows, pad
from rlft.core.errors import ConfigError, DataError
from rlft.core.metrics import Metrics
from rlft.data.examples import Example, ExampleData, example_lengths
from rlft.models.scorer import Scorer


class OnExamples(Algorithm):
    """A mean over examples of a loss that each has by itself; the evaluation is that loss on held-out examples.

    A subclass says how examples become a batch (`rows_per_unit` rows for each) and what their losses are.

    Arguments:
        per_step: examples in an optimizer batch, over all ranks.
        num_held_out: held-out examples of an evaluation; None for all of them.
    """

    objective = ("eval/loss", "min")
    has_samples: ClassVar[bool] = False  # whether an evaluation shows the policy's own completions

    def __init__(self, run: Run, *, per_step: int, num_held_out: int | None) -> None:
        super().__init__(run)
        check_room(run.data, context_length=run.policy.context_length)
        self.per_step, self.num_held_out = per_step, num_held_out

    @abstractmethod
    def make_batch(self, examples: list[Example]) -> Batch:
        """Return the examples as rows, with all that their losses need; called without a gradient."""

    @abstractmethod
    def losses(self, scorer: Scorer, batch: Batch, metrics: Metrics, *, prefix: str) -> Tensor:
        """Return the loss of each example, and add its statistics to `metrics` under names that begin with `prefix`."""

    def collect(self, batch_index: int) -> Batch:
        examples = self.run.data.batch(batch_index, size=self.per_step, seed=self.run.settings.seed)
        return self.make_batch(examples[self.run.rank :: self.run.world_size])

    def loss(
        self, scorer: Scorer, batch: Batch, denominators: Denominators, metrics: Metrics, *, update: int
    ) -> Tensor:
        losses = self.losses(scorer, batch, metrics, prefix="")
        return losses.sum() / (denominators.num_sequences / batch.rows_per_unit)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        metrics, scorer = Metrics(), Scorer(self.run.policy, self.head)
        batch = self.make_batch(self.held_out())
        for micro in batch.micro_batches(**self.run.settings.limits):
            with self.run.autocast():
                metrics.add("eval/loss", self.losses(scorer, micro, metrics, prefix="eval/"))
        return Evaluation(metrics.local(), show_samples(self.run, self.held_out()) if self.has_samples else [])

    def held_out(self) -> list[Example]:
        """Return what an evaluation reads."""
        return held_out(self.run.data, self.num_held_out)

    def plan(self) -> list[tuple[str, str]]:
        held = f"{len(self.held_out()):,}" if self.is_evaluated else NOT_EVALUATED
        return [("examples per step", f"{self.per_step:,}"), ("held-out examples", held), *self.run.data_plan]


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


def show_samples(run: Run, examples: list[Example]) -> list[dict]:
    """Return the policy's own completions of the first prompts, as rows of samples.jsonl."""
    return draw(run, [example.prompt for example in examples[:NUM_SHOWN]], sampling=run.sampling).rows()
