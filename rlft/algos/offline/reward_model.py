"""Reward models from pairs and classifiers of texts: a linear head on the policy's trunk, read behind the last token.

    pairs:   loss = (1 / P) sum_pairs -log sigmoid(s(chosen) - s(rejected) - margin)   (Bradley and Terry; InstructGPT,
             Ouyang et al., arXiv:2203.02155, eq. 1; margin: Llama 2, arXiv:2307.09288, eq. 2)
    classes: loss = (1 / B) sum_texts -log softmax(s(text))_label

P and B count the whole optimizer batch. The trunk is trained with the head. A checkpoint of such a run is a reward for
online training: reward=reward_model (`rlft/rewards/reward_model.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.algos.base import Run, Setup, check_shared
from rlft.algos.offline.on_examples import OnExamples, whole_rows
from rlft.algos.pairs import ROWS_PER_PAIR, wins
from rlft.core.batch import Batch
from rlft.core.errors import CheckpointError
from rlft.core.metrics import Metrics
from rlft.core.ranges import NonNegative, Size
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.data.preferences import has_margins, margins
from rlft.functional.preference import bradley_terry
from rlft.models.heads import ScoreHead
from rlft.models.scorer import Scorer


class RewardModel(OnExamples):
    """A scalar that is larger for the chosen completion than for the rejected one.

    A column `margin` in the data, where there is one, is by how much it should be.

    Arguments:
        pairs_per_step: in an optimizer batch, over all ranks.
        eval_pairs: held-out pairs of an evaluation; None for all of them.
        head_lr_scale: the head's learning rate over the trunk's.
    """

    reads = (Kind.PREFERENCES,)

    def __init__(self, run: Run, *, pairs_per_step: Size, eval_pairs: Size | None, head_lr_scale: NonNegative) -> None:
        super().__init__(run, per_step=pairs_per_step, num_held_out=eval_pairs)
        self.has_margin = has_margins(run.data)
        self.head = ScoreHead(run.policy, lr_scale=head_lr_scale)

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        check_shared("algo.pairs_per_step", settings["pairs_per_step"], setup)

    def make_batch(self, examples: list[Example]) -> Batch:
        batch = _whole_texts(examples, self.run.device, rows_per_unit=ROWS_PER_PAIR)
        if self.has_margin:
            margin = torch.tensor(margins(examples), device=self.run.device)
            batch.values["margin"] = margin.repeat_interleave(ROWS_PER_PAIR)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, metrics: Metrics, *, prefix: str) -> Tensor:
        scores = _outputs(scorer, batch)[:, 0]
        chosen, rejected = scores[0::2], scores[1::2]
        metrics.add(f"{prefix}accuracy", wins(chosen - rejected))  # a tie counts half
        metrics.add(f"{prefix}margin", chosen - rejected)
        metrics.add(f"{prefix}mean_reward", scores)
        margin = batch.values["margin"][0::2] if "margin" in batch.values else None
        return bradley_terry(chosen, rejected, margin)

    def state_dict(self) -> dict:
        return {"reads": "pairs"}  # read by reward=reward_model when it loads a checkpoint


class Classification(OnExamples):
    """A class for each text, by cross entropy.

    Arguments:
        rows_per_step: texts in an optimizer batch, over all ranks.
        eval_rows: held-out texts of an evaluation; None for all of them.
        head_lr_scale: the head's learning rate over the trunk's.
    """

    reads = (Kind.LABELLED,)

    def __init__(self, run: Run, *, rows_per_step: Size, eval_rows: Size | None, head_lr_scale: NonNegative) -> None:
        super().__init__(run, per_step=rows_per_step, num_held_out=eval_rows)
        self.classes = run.data.classes
        self.head = ScoreHead(run.policy, num_outputs=len(self.classes), lr_scale=head_lr_scale)

    @staticmethod
    def check(setup: Setup, **settings: Any) -> None:
        check_shared("algo.rows_per_step", settings["rows_per_step"], setup)

    def make_batch(self, examples: list[Example]) -> Batch:
        batch = _whole_texts(examples, self.run.device, rows_per_unit=1)
        batch.values["labels"] = torch.tensor([example.label for example in examples], device=self.run.device)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, metrics: Metrics, *, prefix: str) -> Tensor:
        logits, labels = _outputs(scorer, batch), batch.values["labels"]
        metrics.add(f"{prefix}accuracy", logits.argmax(dim=1) == labels)
        return F.cross_entropy(logits, labels, reduction="none")

    def plan(self) -> list[tuple[str, str]]:
        if not self.is_evaluated:
            return [("classes", ", ".join(self.classes)), *super().plan()]
        labels = [example.label for example in self.held_out()]
        share = max(map(labels.count, set(labels))) / len(labels)
        return [
            ("classes", ", ".join(self.classes)),
            ("held-out accuracy of the commonest class", f"{share:.3f}"),
            *super().plan(),
        ]

    def state_dict(self) -> dict:
        return {"reads": "text", "classes": self.classes}

    def load_state_dict(self, state: dict) -> None:
        if state["classes"] != self.classes:
            raise CheckpointError(f"the checkpoint's classes are {state['classes']}, the data's {self.classes}")


def _whole_texts(examples: list[Example], device: torch.device, *, rows_per_unit: int) -> Batch:
    num_read = sum(len(example.prompt.ids) + sum(map(len, example.completions)) for example in examples)
    return Batch(whole_rows(examples, device=device), rows_per_unit=rows_per_unit, num_read=num_read)


def _outputs(scorer: Scorer, batch: Batch) -> Tensor:
    """Return what the head says of each row's whole text, [B, K], in float32 at least."""
    values = scorer(batch.rows).values
    assert values is not None
    outputs = values[batch.rows.completion_mask]
    return outputs if outputs.dtype == torch.float64 else outputs.float()
