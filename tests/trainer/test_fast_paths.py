"""Every way to be fast, switched off one at a time: the same tokens are drawn and the same weights come out."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rlft.models.rows
from rlft.algos.base import Algorithm
from rlft.algos.online.policy_gradient import PolicyGradient
from rlft.core.batch import Batch
from rlft.cpu import attention, compiled, gelu
from rlft.cpu import decode as loop
from rlft.functional import logprobs
from rlft.models.gpt2 import GPT2
from rlft.rollout import batching, sampling
from tests.builders import policy_gradient, rows_of, tiny, trainer


def trained(
    directory: Path, *, sizes: dict[str, Any], dtype: torch.dtype = torch.float64, n_embd: int = 16, **limits: Any
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    policy = tiny(3, spread=0.2, n_embd=n_embd).to(dtype)
    algorithm = policy_gradient("grpo", "algo.kl.coef=0", policy=policy, prompts_per_step=4, **sizes, **limits)
    made = trainer(policy, algorithm, directory, steps=4, **limits)
    made.train()
    return policy.state_dict(), rows_of(directory / "metrics.jsonl")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Nothing is fast: padded rows, every row with its own copy of the prompt, one row a micro-batch, none left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT2, "takes_packed", False)
        patch.setattr(PolicyGradient, "needed", Algorithm.needed)
        patch.setattr(Batch, "by_length", lambda batch: batch)
        patch.setattr(batching, "KEEP_FRACTION", 0.0)
        patch.setattr(logprobs, "CHUNK_BYTES", 1)
        return trained(tmp_path_factory.mktemp("plain"), sizes={}, micro_batch=1)


@pytest.mark.parametrize(
    "way",
    ["packed", "last layer", "blocks", "compacted", "in turn", "cut", "padded and cut"],
)
def test_the_same_weights_come_out(way: str, plain: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, Any] = {}
    monkeypatch.setattr(rlft.models.rows, "WORTH_LEAVING", 2.0 if way == "last layer" else 0.0)
    if way == "blocks":
        monkeypatch.setattr(sampling, "BLOCK", 5)
    if way == "compacted":
        monkeypatch.setattr(batching, "KEEP_FRACTION", 1.1)
    if way == "padded and cut":
        monkeypatch.setattr(GPT2, "takes_packed", False)
    if way.endswith("cut"):
        limits["micro_batch_tokens"] = 30
    weights, rows = trained(tmp_path, sizes={"rollout_rows": 5} if way == "in turn" else {}, **limits)
    expected_weights, expected_rows = plain
    moved = tiny(3, spread=0.2).double().state_dict()
    assert max(float((expected_weights[name] - moved[name]).abs().max()) for name in moved) > 1e-2
    for name, tensor in expected_weights.items():
        # Adam's eps is 1e-8: a gradient that is zero but for rounding moves a weight by up to 1e-10 of the rate.
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-9)
    assert any(row.get("efficiency/left_out_fraction", 0.0) > 0 for row in rows)
    for row, expected in zip(rows, expected_rows, strict=True):
        # Statistics over tokens are of the rows that take part, so they are not compared.
        names = {
            "reward",
            "reward_std",
            "loss",
            "grad_norm",
            "completions/mean_length",
            "eval/reward",
        } & expected.keys()
        assert {n: row[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-9, abs=1e-9)


def test_the_same_weights_come_out_of_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode loop, attention and GELU by numba against torch's, in float32, as they are made for."""
    pytest.importorskip("numba")
    monkeypatch.setattr(gelu, "MIN_SIZE", 1)
    calls: list[str] = []

    def count(module: ModuleType, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kwargs: calls.append(module.__name__) or real(*args, **kwargs)
        )

    for module, name in ((loop, "decode"), (gelu, "_in_threads"), (attention, "_in_threads")):
        count(module, name)
    weights, rows = trained(tmp_path / "compiled", sizes={}, dtype=torch.float32, n_embd=32)
    assert set(calls) == {module.__name__ for module in (loop, gelu, attention)}
    monkeypatch.setattr(compiled, "is_possible", lambda: False)
    calls.clear()
    expected_weights, expected_rows = trained(tmp_path / "torch", sizes={}, dtype=torch.float32, n_embd=32)
    assert not calls
    assert [row["reward"] for row in rows if "reward" in row] == [r["reward"] for r in expected_rows if "reward" in r]
    begun = tiny(3, spread=0.2, n_embd=32).state_dict()
    assert max(float((expected_weights[name] - begun[name]).abs().max()) for name in begun) > 1e-2
    for name, tensor in expected_weights.items():
        if name.endswith("c_attn.bias"):  # a bias of keys changes no softmax: its gradient is rounding alone
            tensor[32:64] = weights[name][32:64]
        # Adam divides a gradient's rounding, 1e-7 of its terms, by the gradient.
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4)
