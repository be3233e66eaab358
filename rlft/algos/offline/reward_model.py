"""Reward models from pairs and classifiers of texts: a linear head on the policy's trunk, read behind the last token.

    pairs:   loss = (1 / P) sum_pairs -log sigmoid(s(chosen) - s(rejected) - margin)   (Bradley and Terry; InstructGPT,
             Ouyang et al., arXiv:2203.02155, eq. 1; margin: Llama 2, arXiv:2307.09288, eq. 2)
    classes: loss = (1 / B) sum_texts -log softmax(s(text))_label

P and B count the whole optimizer batch. The trunk is trained with the head. A checkpoint of such a run is a reward for
online training: reward=reward_model (`rlft/rewards/reward_model.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.algos.offline.examples import OnExamples, check_held_out, check_sizes, held_out, whole_rows
from rlft.algos.pairs import ROWS_PER_PAIR, wins
from rlft.core.batch import Batch
from rlft.core.errors import CheckpointError
from rlft.core.metrics import Means
from rlft.core.ranges import NonNegative, Size
from rlft.data.examples import Example
from rlft.data.kinds import Kind
from rlft.data.labelled import LabelledData
from rlft.data.preferences import PreferenceData, has_margins, margins
from rlft.functional.preference import bradley_terry
from rlft.models.base import CausalLM
from rlft.models.heads import ScoreHead
from rlft.models.scorer import Scorer


class RewardModel(OnExamples):
    """A scalar that is larger for the chosen completion than for the rejected one.

    A column `margin` in the data, where there is one, is by how much it should be.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        pairs_per_step: in an optimizer batch, over all ranks.
        eval_pairs: held-out pairs of an evaluation; None for all of them.
        head_lr_scale: the head's learning rate over the trunk's.
        micro_batch, micro_batch_tokens: what one forward of an evaluation may hold.
    """

    reads = (Kind.PREFERENCES,)

    def __init__(
        self,
        *,
        policy: CausalLM,
        data: PreferenceData,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        rank: int,
        world_size: int,
        pairs_per_step: Size,
        eval_pairs: Size | None,
        head_lr_scale: NonNegative,
        micro_batch: Size | None,
        micro_batch_tokens: Size | None,
    ) -> None:
        self.check(has_reference=False, world_size=world_size, pairs_per_step=pairs_per_step, eval_pairs=eval_pairs)
        super().__init__(
            policy=policy, data=data, seed=seed, device=device, autocast=autocast, rank=rank, world_size=world_size,
            per_step=pairs_per_step, num_held_out=eval_pairs, micro_batch=micro_batch,
            micro_batch_tokens=micro_batch_tokens,
        )  # fmt: skip
        self.has_margin = has_margins(data)
        self.head = ScoreHead(policy, lr_scale=head_lr_scale)

    @staticmethod
    def check(  # type: ignore[override]  # it names the settings that it looks at
        *, has_reference: bool, world_size: int, pairs_per_step: int, eval_pairs: int | None, **_: Any
    ) -> None:
        """Raise `ConfigError` for a batch without a pair, or that the ranks cannot share."""
        check_sizes(setting="algo.pairs_per_step", per_step=pairs_per_step, at_least=1, world_size=world_size)
        check_held_out(setting="algo.eval_pairs", count=eval_pairs)

    def make_batch(self, examples: list[Example]) -> Batch:
        batch = _whole_texts(examples, self.device, rows_per_unit=ROWS_PER_PAIR)
        if self.has_margin:
            margin = torch.tensor(margins(examples), device=self.device)
            batch.values["margin"] = margin.repeat_interleave(ROWS_PER_PAIR)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, means: Means, *, prefix: str) -> Tensor:
        scores = _outputs(scorer, batch)[:, 0]
        chosen, rejected = scores[0::2], scores[1::2]
        means.add(f"{prefix}accuracy", wins(chosen - rejected))  # a tie counts half
        means.add(f"{prefix}margin", chosen - rejected)
        means.add(f"{prefix}mean_reward", scores)
        margin = batch.values["margin"][0::2] if "margin" in batch.values else None
        return bradley_terry(chosen, rejected, margin)

    def state_dict(self) -> dict:
        return {"reads": "pairs"}  # for the reward that a checkpoint becomes


class Classification(OnExamples):
    """A class for each text, by cross entropy.

    Arguments (beside the run's objects, which rlft/build.py hands in):
        rows_per_step: texts in an optimizer batch, over all ranks.
        eval_rows: held-out texts of an evaluation; None for all of them.
        head_lr_scale, micro_batch, micro_batch_tokens: as for `RewardModel`.
    """

    reads = (Kind.LABELLED,)

    def __init__(
        self,
        *,
        policy: CausalLM,
        data: LabelledData,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        rank: int,
        world_size: int,
        rows_per_step: Size,
        eval_rows: Size | None,
        head_lr_scale: NonNegative,
        micro_batch: Size | None,
        micro_batch_tokens: Size | None,
    ) -> None:
        self.check(has_reference=False, world_size=world_size, rows_per_step=rows_per_step, eval_rows=eval_rows)
        super().__init__(
            policy=policy, data=data, seed=seed, device=device, autocast=autocast, rank=rank, world_size=world_size,
            per_step=rows_per_step, num_held_out=eval_rows, micro_batch=micro_batch,
            micro_batch_tokens=micro_batch_tokens,
        )  # fmt: skip
        self.classes = data.classes
        self.head = ScoreHead(policy, num_outputs=len(self.classes), lr_scale=head_lr_scale)

    @staticmethod
    def check(  # type: ignore[override]  # it names the settings that it looks at
        *, has_reference: bool, world_size: int, rows_per_step: int, eval_rows: int | None, **_: Any
    ) -> None:
        """Raise `ConfigError` for a batch without a text, or that the ranks cannot share."""
        check_sizes(setting="algo.rows_per_step", per_step=rows_per_step, at_least=1, world_size=world_size)
        check_held_out(setting="algo.eval_rows", count=eval_rows)

    def make_batch(self, examples: list[Example]) -> Batch:
        batch = _whole_texts(examples, self.device, rows_per_unit=1)
        batch.values["labels"] = torch.tensor([example.label for example in examples], device=self.device)
        return batch

    def losses(self, scorer: Scorer, batch: Batch, means: Means, *, prefix: str) -> Tensor:
        logits, labels = _outputs(scorer, batch), batch.values["labels"]
        means.add(f"{prefix}accuracy", logits.argmax(dim=1) == labels)
        return F.cross_entropy(logits, labels, reduction="none")

    def plan(self) -> list[tuple[str, str]]:
        if not self.is_evaluated:
            return [("classes", ", ".join(self.classes)), *super().plan()]
        labels = [example.label for example in held_out(self.data, self.num_held_out)]
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
