"""The example's gradient is that of the exact expected reward, its samples follow its probabilities, and it learns."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "reinforce_from_scratch.py"
TEXTS = [digit + "".join(letters) for digit in "0123456" for letters in itertools.product("ab", repeat=6)]


@pytest.fixture
def example() -> ModuleType:
    """The example as a module of the test's own, so that a test may change it."""
    spec = importlib.util.spec_from_file_location("reinforce_from_scratch", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(example) -> torch.nn.Module:
    """A model in float64, whose probabilities are far from even."""
    torch.manual_seed(1)
    model = example.Model(width=8).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def ids_of(example: ModuleType, texts: list[str]) -> Tensor:
    return torch.tensor([[example.CHARACTERS.index(c) for c in text] for text in texts])


def probabilities(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The probability of each text given its digit, letter by letter: [B]."""
    p = torch.ones(len(ids), dtype=torch.float64)
    for t in range(1, ids.shape[1]):
        p = p * model(ids[:, :t])[:, -1].exp()[torch.arange(len(ids)), ids[:, t]]
    return p


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_mean_of_its_gradients_is_the_gradient_of_the_expected_reward(example, model, baseline):
    ids, parameters = ids_of(example, TEXTS), list(model.parameters())
    rewards = torch.tensor([1 - abs(t[1:].count("a") - int(t[0])) / 6 for t in TEXTS], dtype=torch.float64)
    p = probabilities(model, ids)
    exact = torch.autograd.grad((p * rewards).sum() / 7, parameters)
    loss = (p.detach() * example.reinforce(model, ids, baseline)).sum() / 7
    for ours, expected in zip(torch.autograd.grad(loss, parameters), exact, strict=True):
        torch.testing.assert_close(-ours, expected, rtol=0.0, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in exact) > 0.01


def test_its_own_check_passes_and_finds_a_wrong_gradient(example, model, monkeypatch):
    assert example.check(model, baseline=0.7) < 1e-12
    right = example.reinforce
    monkeypatch.setattr(example, "reinforce", lambda model, ids, baseline: 0.9 * right(model, ids, baseline))
    assert example.check(model, baseline=0.7) > 1e-3


def test_it_samples_from_its_probabilities(example, model):
    torch.manual_seed(0)
    of_four = [text for text in TEXTS if text[0] == "4"]
    drawn = example.sample(model, ids_of(example, ["4"]).expand(20_000, 1))
    found = torch.tensor([float((drawn == ids).all(dim=1).sum()) for ids in ids_of(example, of_four)]) / len(drawn)
    exact = probabilities(model, ids_of(example, of_four)).detach()
    # total variation distance: 0.02 for 20,000 draws from 64 texts; sampling evenly would be far off
    assert (found - exact).abs().sum() / 2 < 0.03 < (exact - 1 / 64).abs().sum() / 2


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_it_learns_from_the_reward_alone(example, monkeypatch, capsys, is_shuffled):
    def shuffled(model: torch.nn.Module, ids: Tensor, baseline: float) -> Tensor:
        rewards = example.reward(ids)[torch.randperm(len(ids))]
        return -(rewards - baseline) * example.log_probability(model, ids)

    if is_shuffled:
        monkeypatch.setattr(example, "reinforce", shuffled)
    example.main(steps=150)
    rewards = [float(reward) for reward in re.findall(r"reward ([\d.]+)", capsys.readouterr().out)]
    assert len(rewards) == 4 and 0.5 < rewards[0] < 0.75
    assert rewards[-1] < 0.75 if is_shuffled else rewards[-1] > 0.93  # measured: 0.6 and 0.98


def test_it_has_at_most_100_lines_and_imports_torch_alone():
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 100
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert set(names) == {"torch"}
