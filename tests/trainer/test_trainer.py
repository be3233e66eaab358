from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlft.algos.base import Algorithm, Evaluation
from rlft.core.errors import ConfigError, NonFiniteError
from rlft.references.frozen import initial
from rlft.trainer.schedule import learning_rate
from tests.builders import FixedText, policy_gradient, rows_of, sft, tiny, trainer

BLOCKS = torch.randint(0, 12, (24, 9), generator=torch.Generator().manual_seed(0))


class Scripted(Algorithm):
    """SFT with set evaluation values, and with losses that are made nan at given batches."""

    objective = ("eval/loss", "min")

    def __init__(self, policy, *, values=(1.0,), bad=(), updates: int = 1, rows: int = 4) -> None:
        self.inner = sft(policy, FixedText(BLOCKS, BLOCKS[:4]), rows_per_step=rows)
        super().__init__(self.inner.run)
        self.values, self.bad, self.updates_per_batch = list(values), bad, updates
        self.collected: list[int] = []
        self.updates: list[int] = []

    def collect(self, batch_index: int):
        self.collected.append(batch_index)
        return self.inner.collect(batch_index)

    def loss(self, scorer, batch, denominators, metrics, *, update: int):
        self.updates.append(update)
        loss = self.inner.loss(scorer, batch, denominators, metrics, update=update)
        return loss * math.nan if self.collected[-1] in self.bad else loss

    def evaluate(self) -> Evaluation:
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return Evaluation({"eval/loss": value}, [{"prompt": "", "completion": "x"}] * 7)

    def plan(self) -> list[tuple[str, str]]:
        return self.inner.plan()

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.values = state["values"]


def scripted(run_dir, *, seed: int = 3, **arguments: Any):
    """A trainer on a scripted algorithm; `values`, `bad`, `updates`, `rows` go to the script, the rest to settings."""
    policy = tiny(seed, spread=0.2)
    script = {key: arguments.pop(key) for key in ("values", "bad", "updates", "rows") if key in arguments}
    return trainer(policy, Scripted(policy, **script), run_dir, **arguments)


def weights(made) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.policy.state_dict().items()}


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# The step.


def test_step_is_torchs_own_clipped_adamw_step_at_the_schedules_rate(tmp_path):
    settings = {"learning_rate": 1e-2, "schedule": "linear", "warmup_steps": 2, "max_grad_norm": 0.3, "steps": 5}
    policy, other = tiny(3, spread=0.2).double(), tiny(3, spread=0.2).double()
    made = trainer(policy, Scripted(policy), tmp_path, weight_decay=0.1, **settings)
    optimizer = other.configure_optimizers(learning_rate=1.0, weight_decay=0.1, betas=(0.9, 0.99))
    for step in range(5):
        blocks = made.algorithm.run.data.batch(step, size=4, seed=0)
        logits = other(blocks[:, :-1]) @ other.head_weight.t()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3))
        rate = learning_rate(step, peak=1e-2, schedule="linear", warmup_steps=2, total_steps=5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        row = made.step(step)
        assert norm > 0.3
        assert row["learning_rate"] == rate
        assert (row["loss"], row["grad_norm"]) == pytest.approx((float(loss.detach()), norm), rel=1e-10)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(policy.state_dict()[name], tensor, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("limits", [{"micro_batch": 1}, {"micro_batch": 3}, {"micro_batch_tokens": 25}])
@pytest.mark.parametrize("kind", ["sft", "grpo", "rloo"])
def test_losses_and_weights_do_not_depend_on_micro_batches(tmp_path, kind, limits):
    def run(name: str, **limits: Any):
        policy = tiny(3, spread=0.2).double()
        if kind == "sft":
            algorithm: Any = sft(policy, FixedText(BLOCKS, BLOCKS[:4]))
        else:
            algorithm = policy_gradient(kind, policy=policy, reference=initial(policy), **limits)
        made = trainer(policy, algorithm, tmp_path / name, steps=3, **limits)
        made.train()
        return weights(made), rows_of(tmp_path / name / "metrics.jsonl")

    whole_weights, whole_rows = run("whole")
    cut_weights, cut_rows = run("cut", **limits)
    for name, tensor in whole_weights.items():
        torch.testing.assert_close(cut_weights[name], tensor, rtol=0, atol=1e-10)
    for whole, cut in zip(whole_rows, cut_rows, strict=True):
        assert cut == pytest.approx(whole, rel=1e-10, abs=1e-10)
    assert whole_rows[1]["grad_norm"] > 1e-3


def test_two_updates_take_one_batch_for_two_steps(tmp_path):
    made = scripted(tmp_path, updates=2, steps=6, micro_batch=2, save_every=3, keep=9)
    made.train()
    assert made.algorithm.collected == [0, 1, 2]
    assert made.algorithm.updates == [0, 0, 1, 1] * 3  # two micro-batches a step
    assert made.checkpoints.steps() == [4, 6]  # at the end of the batch in which the third step, and the sixth, fell


@pytest.mark.parametrize(("target", "is_passed_over"), [(1e-9, [0, 0, 1, 1]), (1e9, [0, 0, 0, 0])])
def test_the_metrics_of_an_update_decide_on_those_that_are_left_on_its_batch(tmp_path, target, is_passed_over):
    policy = tiny(3, spread=0.2)
    overrides = ("algo.epochs=4", f"algo.target_kl={target}")
    algorithm = policy_gradient("ppo", *overrides, policy=policy, reference=initial(policy))
    made = trainer(policy, algorithm, tmp_path, steps=8)
    seen = [weights(made)]
    rows = []
    for step in range(8):
        rows.append(made.step(step))
        seen.append(weights(made))
    # The first update moves nothing yet that it could measure; the second sees how far it went. Each batch begins anew.
    assert [row["passed_over"] for row in rows] == is_passed_over * 2
    assert [is_same(a, b) for a, b in pairwise(seen)] == [bool(passed) for passed in is_passed_over * 2]
    assert ["policy/approxkl" in row for row in rows] == [not passed for passed in is_passed_over * 2]
    assert rows[0]["policy/approxkl"] < 1e-9 < rows[1]["policy/approxkl"] < 1e9


# Logs.


def test_row_zero_is_the_evaluation_of_the_untouched_policy(tmp_path):
    made = scripted(tmp_path, steps=2, values=[5.0, 4.0])
    made.train()
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert rows[0] == {"step": 0, "eval/loss": 5.0}
    assert [row.get("eval/loss") for row in rows] == [5.0, None, 4.0]
    assert (made.state.before, made.state.after) == ({"eval/loss": 5.0}, {"eval/loss": 4.0})


def test_every_step_has_its_row_and_trackers_hear_of_every_nth_and_of_evaluations(tmp_path):
    made = scripted(tmp_path, steps=8, log_every=3, eval_every=4)
    made.train()
    rows = rows_of(tmp_path / "metrics.jsonl", times=True)
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["num_tokens"] for row in rows[1:]] == [32 * step for step in range(1, 9)]
    assert {"loss", "grad_norm", "learning_rate", "entropy", "step_time", "wall_time", "time/update"} <= rows[1].keys()
    assert [step for step, _ in made.tracker.rows] == [0, 3, 4, 6, 8]
    assert rows[8]["wall_time"] >= rows[1]["wall_time"] > 0


def test_samples_of_evaluations_are_kept_with_their_step(tmp_path):
    made = scripted(tmp_path, steps=2)
    made.train()
    samples = rows_of(tmp_path / "samples.jsonl")
    assert [s["step"] for s in samples] == [0] * 7 + [2] * 7
    assert samples[0] == {"step": 0, "split": "eval", "prompt": "", "completion": "x"}
    assert "Held-out samples, before training" in made.progress.titles


# Ends.


def test_max_tokens_ends_the_run_at_the_step_that_reaches_it(tmp_path):
    made = scripted(tmp_path, steps=100, max_tokens=65)
    assert made.train() == "max_tokens"
    assert (made.state.step, made.state.num_tokens) == (3, 96)  # 32 a step
    assert made.checkpoints.steps() == [3]


def with_clock(monkeypatch, made, *, start: float):
    """Every step takes 30 s."""
    now = [start]
    monkeypatch.setattr("rlft.trainer.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    collect = made.algorithm.collect

    def slow(batch_index: int):
        now[0] += 30.0
        return collect(batch_index)

    made.algorithm.collect = slow
    return made


def test_max_minutes_ends_the_run_over_all_its_starts(tmp_path, monkeypatch):
    made = with_clock(monkeypatch, scripted(tmp_path / "a", steps=100, max_minutes=1.75), start=1000.0)
    assert made.train() == "max_minutes"
    assert (made.state.step, made.state.seconds) == (4, 120.0)
    first = with_clock(monkeypatch, scripted(tmp_path / "b", steps=100, max_minutes=1.75), start=5.0)
    assert first.train(should_stop=lambda: first.state.step == 3) == "signal"
    second = with_clock(monkeypatch, scripted(tmp_path / "b", steps=100, max_minutes=1.75), start=7e6)
    second.resume()
    assert second.train() == "max_minutes"
    assert (second.state.step, second.state.seconds) == (4, 120.0)


def test_early_stopping_ends_after_patience_and_takes_the_best_policy(tmp_path):
    values = [5.0, 4.0, 3.0, 3.5, 3.0, 9.0]  # equal is not better
    made = scripted(tmp_path / "a", steps=100, eval_every=2, patience=2, values=values, keep=1)
    assert made.train() == "early_stopping"
    assert (made.state.step, made.state.best_step, made.state.best_value) == (8, 4, 3.0)
    expected = scripted(tmp_path / "b", steps=4)
    expected.train()
    assert is_same(weights(made), weights(expected))
    assert made.state.after == {"eval/loss": 9.0}  # the best policy, measured again


def test_early_stopping_returns_to_the_untouched_policy_where_nothing_was_better(tmp_path):
    made = scripted(tmp_path, steps=100, eval_every=1, patience=2, values=[1.0, 2.0, 3.0, 1.0])
    before = weights(made)
    assert made.train() == "early_stopping"
    assert (made.state.step, made.state.best_step) == (2, 0)
    assert is_same(weights(made), before)


def test_run_killed_right_after_its_first_checkpoint_keeps_one_row_zero(tmp_path):
    first = scripted(tmp_path, steps=3, eval_every=1, patience=9, values=[1.0, 2.0, 3.0, 4.0])
    first.step = lambda step: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = scripted(tmp_path, steps=3, eval_every=1, patience=9, values=[1.0])
    second.resume()
    assert second.train() == "steps"
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["eval/loss"]) for row in rows] == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]


def test_best_of_a_run_must_fall_where_a_checkpoint_can_be_taken(tmp_path):
    with pytest.raises(ConfigError, match=r"steps=3 must be a multiple of the 2 optimizer steps on a batch.*steps=4"):
        scripted(tmp_path, updates=2, steps=3)
    made = scripted(tmp_path, steps=8, updates=2, eval_every=1, patience=1, values=[5.0, 4.0, 6.0, 4.0])
    assert made.train() == "early_stopping"
    assert (made.state.step, made.state.best_step) == (4, 2)


def test_newest_and_best_checkpoints_stay(tmp_path):
    made = scripted(tmp_path, steps=8, eval_every=2, save_every=1, keep=2, values=[5.0, 4.0, 6.0, 7.0, 8.0])
    made.train()
    assert made.checkpoints.steps() == [2, 7, 8]


@pytest.mark.parametrize("patience, steps", [(None, [6]), (9, [2, 6])])
def test_save_every_0_writes_at_the_end_and_a_new_best_only_where_early_stopping_may_want_it(tmp_path, patience, steps):
    values = [5.0, 4.0, 6.0, 7.0]
    made = scripted(tmp_path, steps=6, eval_every=2, save_every=0, patience=patience, values=values, keep=1)
    made.train()
    assert made.checkpoints.steps() == steps


# Numbers that are not finite.


@pytest.mark.parametrize("rows", [4, 1])
def test_loss_that_is_not_finite_skips_the_step_counts_it_and_saves_the_batch(tmp_path, rows):
    made = scripted(tmp_path, steps=4, bad=(1,), rows=rows)
    made.state.before = {"eval/loss": 1.0}
    seen = [weights(made)]
    logged = []
    for step in range(4):
        logged.append(made.step(step))
        seen.append(weights(made))
    assert [is_same(a, b) for a, b in pairwise(seen)] == [False, True, False, False]
    assert [row["non_finite_steps"] for row in logged] == [0, 1, 1, 1]
    assert math.isnan(logged[1]["loss"])
    assert made.state.non_finite_in_row == 0
    saved = load_file(tmp_path / "non_finite_batch.safetensors")
    assert torch.equal(saved["completion_ids"], made.algorithm.inner.collect(1).rows.completion_ids)
    assert "step 2 skipped: loss nan" in made.progress.messages[0]
    assert str(tmp_path / "non_finite_batch.safetensors") in made.progress.messages[0]


def test_gradient_that_is_not_finite_skips_the_step_too(tmp_path):
    made = scripted(tmp_path)
    before = weights(made)
    made.scorer.policy.wpe.weight.register_hook(lambda gradient: gradient * math.inf)
    row = made.step(0)
    assert math.isfinite(row["loss"])
    assert row["non_finite_steps"] == 1
    assert is_same(weights(made), before)


def test_three_in_a_row_stop_the_run_with_the_policy_as_it_was(tmp_path):
    made = scripted(tmp_path, steps=20, bad=(1, 2, 4, 5, 6), save_every=1)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row \(the last is 7\).*non_finite_batch\.safetensors"):
        made.train()
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row.get("loss") is None for row in rows] == [True, False, True, True, False, True, True]  # row 0 has none
    assert made.checkpoints.steps()[-1] == 6
    made.checkpoints.load(6, other := tiny(3))
    assert is_same(weights(made), dict(other.state_dict()))
