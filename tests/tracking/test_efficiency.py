from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.models.hf import HFCausalLM
from rlft.models.scorer import Scorer
from rlft.references.frozen import initial
from rlft.tracking import efficiency
from tests.builders import CPU, policy_gradient, rows_of, tiny, trainer
from tests.models.tiny import random_ids
from tests.models.tiny import rows_of as rows_from

PROMPTS = random_ids(1, [6, 6])
OF_ROW = [0, 0, 1]
COMPLETIONS = random_ids(2, [5, 5, 5])


@pytest.mark.parametrize("counted", [slice(None), slice(2, None), slice(4, None)])
def test_needed_operations_are_those_that_torch_counts(counted: slice) -> None:
    """Only matrix products: we count pairs that attend, while torch counts all pairs."""
    policy = GPT2.from_config(vocab_size=19, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    rows = rows_from(PROMPTS, COMPLETIONS, OF_ROW)
    mask = torch.zeros_like(rows.completion_mask)
    mask[:, counted] = True  # a reward model's loss counts only the last tokens
    rows = replace(rows, completion_mask=mask)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Scorer(policy)(rows)
    counts = {str(operation): number for operation, number in counter.get_flop_counts()["Global"].items()}
    products = sum(number for name, number in counts.items() if name in ("aten.addmm", "aten.mm"))
    pairs = 2 * (6 * 7 // 2) + 3 * (4 * 6 + 4 * 5 // 2)
    attention = 4 * 16 * 2 * pairs
    assert efficiency.forward_flops(policy, rows) == products + attention


@pytest.mark.parametrize("name", ["gpt2", "llama with grouped heads"])
def test_attention_is_counted_for_query_heads_as_torch_counts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gpt2":
        monkeypatch.setattr(GPT2, "takes_packed", False)  # torch cannot count compiled code
        policy: CausalLM = GPT2.from_config(vocab_size=19, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=19, intermediate_size=32, max_position_embeddings=24, **sizes)
        policy = HFCausalLM(LlamaForCausalLM(config))
    rows = rows_from(PROMPTS, COMPLETIONS, OF_ROW)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        Scorer(policy)(rows)
    counts = {str(operation): number for operation, number in counter.get_flop_counts()["Global"].items()}
    # Torch counts all pairs: 6 x 6 in each prompt, and the 4 tokens of a completion with all 6 + 4 tokens.
    squares, pairs = 2 * 6 * 6 + 3 * 4 * (6 + 4), 2 * (6 * 7 // 2) + 3 * (4 * 6 + 4 * 5 // 2)
    # Rounded down: some versions of transformers also compute rotary angles by a small product.
    needed, attention = efficiency.forward_flops(policy, rows), counts["aten.bmm"] // squares * pairs
    if name != "gpt2":  # torch counts its last layer in full here
        assert needed == counts["aten.mm"] + attention
    policy.num_heads = 0
    assert needed - efficiency.forward_flops(policy, rows) == attention


def test_padding_is_what_layers_compute_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny()
    rows = rows_from(random_ids(1, [2, 6]), random_ids(2, [5, 3]), [0, 1])
    assert efficiency.padding_fraction(policy, [rows]) == 0.0
    monkeypatch.setattr(GPT2, "takes_packed", False)
    # Positions: 2 x 6 in prompts and 2 x 4 in completions; tokens that are read: 2 + 6 and 4 + 2.
    assert efficiency.padding_fraction(policy, [rows]) == pytest.approx(1 - 14 / 20)


def test_the_ceiling_is_a_rate_that_a_large_product_reaches() -> None:
    rate = efficiency.measured_ceiling(CPU, torch.float32)
    assert 1e8 < rate < 1e14
    assert efficiency.measured_ceiling(CPU, torch.float32) == rate  # measured once


def test_a_steps_parts_add_up_to_its_time(tmp_path: Path) -> None:
    policy = tiny(3, spread=0.2)
    trainer(policy, policy_gradient("grpo", policy=policy, reference=initial(policy)), tmp_path, steps=2).train()
    for row in rows_of(tmp_path / "metrics.jsonl", times=True)[1:]:
        names = ["prefill", "decode", "reward", "reference", "update", "optimizer", "other"]
        assert sum(row[f"time/{name}"] for name in names) == pytest.approx(row["step_time"])
        assert all(row[f"time/{name}"] > 0 for name in names)
        assert row["efficiency/update_mfu"] > 0
        assert row["memory/peak_gib"] > 0.01


def test_a_trace_of_two_steps_is_written_where_asked_for(tmp_path: Path) -> None:
    for asked in (True, False):
        policy, directory = tiny(3, spread=0.2), tmp_path / str(asked)
        trainer(
            policy, policy_gradient("grpo", policy=policy, reference=initial(policy)), directory, steps=5, profile=asked
        ).train()
        assert (directory / "trace.json").exists() == asked
    events = json.loads((tmp_path / "True" / "trace.json").read_text())["traceEvents"]
    assert any(event["name"] == "aten::addmm" for event in events)
    assert sum(event["name"].startswith("ProfilerStep#") and event["ph"] == "X" for event in events) == 2
