"""What the tests of algorithms on pairs and labels are made of: rows in memory, and builders from the YAML files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlft import build
from rlft.core.batch import Batch, Denominators
from rlft.core.metrics import Metrics
from rlft.data.completions import CompletionData
from rlft.data.labelled import LabelledData, UnpairedData
from rlft.data.preferences import PreferenceData
from rlft.data.source import Row
from rlft.models.scorer import Scorer
from tests.builders import TOKENIZER, algorithm_node, run_of, tiny

# Prompts of 1 to 7 tokens, completions of 1 to 6 (their end token comes on top); two pairs share a prompt's text.
PAIRS = [
    ("abc", "ddd", "e"), ("d", "a", "bcdefg"), ("efghijk", "ka", "jb"), ("jk", "hgf", "ab"), ("jk", "c", "dd"),
    ("a", "kk", "ijh"), ("ghi", "b", "ba"),
]  # fmt: skip
JUDGED = [("abc", "dd", 1), ("d", "ea", 0), ("efg", "k", 1), ("hh", "bcdef", 0), ("a", "ij", 1), ("bk", "c", 1)]
LABELLED = [("abc", "x"), ("d", "y"), ("efghijk", "z"), ("ja", "x"), ("kkkk", "y")]


class Memory:
    """A source over given rows; those of the validation split are the training rows unless given."""

    def __init__(self, rows: Sequence[Row], held_out: Sequence[Row] | None = None) -> None:
        self.splits = {"train": list(rows), "validation": list(rows if held_out is None else held_out), "test": []}
        self.counts = {"rows": len(rows)}

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]


def table(records: Sequence[tuple], names: Sequence[str]) -> list[Row]:
    """Rows whose first value is the text; the others are columns of these names."""
    return [
        Row(text, dict(zip(names, values, strict=True)), f"memory:{number}")
        for number, (text, *values) in enumerate(records, 1)
    ]


def pairs(records: Sequence[tuple] = PAIRS, held_out: Sequence[tuple] | None = None, **knobs: Any) -> PreferenceData:
    names = ("chosen", "rejected", "margin")[: len(records[0]) - 1]
    source = Memory(table(records, names), None if held_out is None else table(held_out, names))
    return PreferenceData(source, tokenizer=TOKENIZER, **knobs)


def judged(records: Sequence[tuple] = JUDGED, held_out: Sequence[tuple] | None = None, **knobs: Any) -> UnpairedData:
    names = ("completion", "label")
    source = Memory(table(records, names), None if held_out is None else table(held_out, names))
    return UnpairedData(source, tokenizer=TOKENIZER, **knobs)


def completions(records: Sequence[tuple], held_out: Sequence[tuple] | None = None, **knobs: Any) -> CompletionData:
    source = Memory(table(records, ("completion",)), None if held_out is None else table(held_out, ("completion",)))
    return CompletionData(source, tokenizer=TOKENIZER, **knobs)


def labelled(
    records: Sequence[tuple] = LABELLED, held_out: Sequence[tuple] | None = None, **knobs: Any
) -> LabelledData:
    source = Memory(table(records, ("label",)), None if held_out is None else table(held_out, ("label",)))
    return LabelledData(source, tokenizer=TOKENIZER, **knobs)


def build_offline(name: str, *overrides: str, policy: Any = None, data: Any, **given: Any) -> Any:
    """Build an algorithm from its YAML."""
    run = run_of(policy or tiny(9, spread=0.25).double(), data, **({"max_new_tokens": 4} | given))
    return build.algorithm(algorithm_node(name, overrides), run)


def reference() -> Any:
    """Another uneven model than the policy."""
    return tiny(2, spread=0.25).double()


def totals(batch: Batch) -> Denominators:
    return Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)


def loss_of(algorithm: Any, batch: Batch, metrics: Metrics | None = None) -> Tensor:
    return algorithm.loss(
        Scorer(algorithm.run.policy, algorithm.head), batch, totals(batch), metrics or Metrics(), update=0
    )


def gradient(loss: Tensor, algorithm: Any) -> Tensor:
    """Of all parameters that are trained, as one vector."""
    modules = [module for module in (algorithm.run.policy, algorithm.head) if module is not None]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = (torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))
    return torch.cat([g.flatten() for g in filled])


def widened(batch: Batch, *, by: int = 3, filler: int = 7) -> Batch:
    """The batch with more padding on prompts and completions, filled with a token."""
    rows = vars(batch.rows)
    more = {
        name: torch.nn.functional.pad(rows[name], (0, by), value=filler) for name in ("prompt_ids", "completion_ids")
    }
    mask = torch.nn.functional.pad(batch.rows.completion_mask, (0, by))
    return Batch(
        type(batch.rows)(**(rows | more | {"completion_mask": mask})), batch.values, rows_per_unit=batch.rows_per_unit
    )
