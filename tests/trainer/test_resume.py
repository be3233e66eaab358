"""A run that was stopped or killed and resumed is bit for bit the run that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.core.errors import CheckpointError
from rlft.references.frozen import initial
from rlft.trainer.trainer import Trainer
from tests.algos.offline.builders import build_offline, pairs
from tests.builders import (
    FixedPrompts,
    FixedText,
    policy_gradient,
    reward_sum,
    rows_of,
    sft,
    share_of_a,
    tiny,
    trainer,
)

STEPS = 6


class Killed(BaseException):
    """Stands for the process's end: nothing may catch it."""


def grpo_two_updates(policy) -> Any:
    return policy_gradient("grpo", "algo.epochs=2", policy=policy, reference=initial(policy))


def rloo(policy) -> Any:
    return policy_gradient("rloo", "algo/kl_controller=adaptive", policy=policy, reference=initial(policy))


def ppo(policy) -> Any:
    overrides = ("algo.epochs=2", "algo.kl.coef=0.1", "algo/kl_controller=annealed", "algo.kl.controller.tokens=60")
    return policy_gradient("ppo", *overrides, policy=policy, reference=initial(policy))


def baseline(policy) -> Any:
    overrides = ("algo/advantage=running_baseline", "algo.entropy_coef=0.1", "algo.entropy_decay_batches=5")
    return policy_gradient("reinforce", *overrides, policy=policy, reference=initial(policy))


def dapo(policy) -> Any:
    return policy_gradient("dapo", policy=policy, reference=initial(policy))


def text(policy) -> Any:
    blocks = torch.randint(0, 12, (13, 9), generator=torch.Generator().manual_seed(0))
    return sft(policy, FixedText(blocks, blocks[:4]))


def online_dpo(policy) -> Any:
    data, rewards = FixedPrompts(("abc", "d", "efghi", "jk")), reward_sum(share_of_a)
    return build_offline("online_dpo", policy=policy, reference=initial(policy), data=data, rewards=rewards)


def dpo(policy) -> Any:
    return build_offline("dpo", "algo.pairs_per_step=3", policy=policy, reference=initial(policy), data=pairs())


def reward_model(policy) -> Any:
    return build_offline("reward_model", "algo.pairs_per_step=3", policy=policy, data=pairs())


ALGORITHMS = [grpo_two_updates, rloo, ppo, baseline, dapo, text, online_dpo, dpo, reward_model]


def start(make, run_dir: Path, **changes: Any) -> Trainer:
    """A trainer as a new process would build it: weights from the seed, nothing kept."""
    policy = tiny(3, spread=0.2)
    settings = {"steps": STEPS, "eval_every": 2, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
    return trainer(policy, make(policy), run_dir, **(settings | changes))


def everything(run_dir: Path, made: Trainer) -> dict[str, Any]:
    """Weights, optimizer state, trainer state and every row, without times."""
    moments = made._inner_optimizer.state_dict()["state"]
    head = made.algorithm.head
    tensors = dict(made.policy.state_dict()) | {f"head.{k}": t for k, t in (head.state_dict() if head else {}).items()}
    tensors |= {f"{i}.{k}": t for i, e in moments.items() for k, t in e.items()}
    state = {name: value for name, value in vars(made.state).items() if name != "seconds"}
    files = [run_dir / name for name in ("metrics.jsonl", "samples.jsonl")]  # a reward model has no samples
    rows = {file.name: rows_of(file) if file.exists() else [] for file in files}
    return {"tensors": {k: t.clone() for k, t in tensors.items()}, "state": state, **rows}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["tensors"].keys() == b["tensors"].keys()
    assert [name for name in a["tensors"] if not torch.equal(a["tensors"][name], b["tensors"][name])] == []
    for name in ("state", "metrics.jsonl", "samples.jsonl"):
        assert a[name] == b[name], name


@pytest.fixture(scope="module", params=ALGORITHMS, ids=lambda make: make.__name__)
def uninterrupted(request, tmp_path_factory) -> tuple[Any, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("whole")
    made = start(request.param, run_dir)
    assert made.train() == "steps"
    return request.param, everything(run_dir, made)


def test_two_runs_with_one_seed_write_the_same_rows(uninterrupted, tmp_path):
    make, expected = uninterrupted
    made = start(make, tmp_path)
    made.train()
    assert_same(everything(tmp_path, made), expected)
    assert [row["step"] for row in expected["metrics.jsonl"]] == list(range(STEPS + 1))


def test_run_that_was_stopped_and_resumed_is_the_run_that_was_not(uninterrupted, tmp_path):
    make, expected = uninterrupted
    first = start(make, tmp_path)
    assert first.train(should_stop=lambda: first.state.step >= 3) == "signal"
    assert first.state.step == (4 if make in (grpo_two_updates, ppo) else 3)  # a batch is used up first
    assert first.checkpoints.steps()[-1] == first.state.step
    second = start(make, tmp_path)
    second.resume()
    assert second.state.step == first.state.step
    assert second.train() == "steps"
    assert_same(everything(tmp_path, second), expected)


def test_run_that_was_killed_after_its_last_checkpoint_is_cut_and_computed_again(uninterrupted, tmp_path):
    make, expected = uninterrupted
    first = start(make, tmp_path, save_every=2)
    kill_in_step(first, 6)
    with pytest.raises(Killed):
        first.train()
    # what else a kill can leave: rows of later steps, half a row, half a checkpoint
    first.metrics_file.write({"step": 6, "loss": 1e9})
    first.samples_file.write({"step": 6, "completion": "lost"})
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 5, "re')
    (tmp_path / "checkpoints" / ".step_00000006.tmp").mkdir()
    second = start(make, tmp_path)
    second.resume()
    assert second.state.step == 4
    assert second.train() == "steps"
    assert_same(everything(tmp_path, second), expected)


def kill_in_step(made: Trainer, step: int) -> None:
    """Die within optimizer step `step`, after its gradients."""
    update = made._update

    def dying(batch: Any, loss: float, rate: float) -> float:
        if made.state.step == step - 1:
            raise Killed
        return update(batch, loss, rate)

    made._update = dying


def test_run_that_was_killed_before_its_first_checkpoint_starts_again(uninterrupted, tmp_path):
    make, expected = uninterrupted
    first = start(make, tmp_path)
    kill_in_step(first, 2)
    with pytest.raises(Killed):
        first.train()
    assert rows_of(tmp_path / "metrics.jsonl")
    second = start(make, tmp_path)
    second.resume()
    assert second.state.step == 0
    second.train()
    # evaluations at 2, 4, 6 save the best; nothing else does
    assert_same(everything(tmp_path, second), expected)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = start(text, tmp_path)
    first.train()
    expected = everything(tmp_path, first)
    second = start(text, tmp_path)
    second.resume()
    assert second.train() == "steps"
    assert_same(everything(tmp_path, second), expected)
    assert second.state.seconds == first.state.seconds


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    whole = start(text, tmp_path / "whole", steps=8, schedule="constant")
    whole.train()
    short = start(text, tmp_path / "parts", steps=6, schedule="constant")
    short.train()
    longer = start(text, tmp_path / "parts", steps=8, schedule="constant")
    longer.resume()
    longer.train()
    assert_same(everything(tmp_path / "parts", longer), everything(tmp_path / "whole", whole))


def test_newest_checkpoint_that_is_damaged_is_an_error_not_a_silent_restart(tmp_path):
    made = start(text, tmp_path)
    made.train()
    newest = tmp_path / "checkpoints" / f"step_{STEPS:08d}"
    (newest / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_00000006/state\.json is missing or damaged"):
        start(text, tmp_path).resume()


def test_state_in_a_checkpoint_is_json_with_all_that_changes(tmp_path):
    made = start(text, tmp_path)
    made.train()
    state = json.loads((tmp_path / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    assert state["trainer"] == vars(made.state)
    assert state["trainer"]["num_tokens"] == STEPS * 4 * 8
