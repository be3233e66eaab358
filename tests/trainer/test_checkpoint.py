from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlft.core import manifest
from rlft.core.errors import CheckpointError
from rlft.models.gpt2 import GPT2
from rlft.trainer import checkpoint
from rlft.trainer.checkpoint import Checkpoints
from tests.builders import perturbed, tiny

FILES = ["manifest.json", "optimizer.safetensors", "policy.safetensors", "state.json"]


class Killed(Exception):
    """Stands for the process's end."""


def policy_and_optimizer(seed: int = 0, *, steps: int = 2, **sizes) -> tuple[GPT2, torch.optim.AdamW]:
    policy = tiny(seed, **sizes)
    optimizer = policy.configure_optimizers(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    for step in range(steps):
        train_once(policy, optimizer, step)
    return policy, optimizer


def train_once(policy: GPT2, optimizer: torch.optim.AdamW, step: int) -> None:
    ids = torch.arange(10)[None] + step % 2
    optimizer.zero_grad()
    (policy(ids) @ policy.head_weight.t()).square().sum().backward()
    optimizer.step()


def tensors(policy: GPT2, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}
    return {k: v.clone() for k, v in (policy.state_dict() | moments).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def saved(tmp_path) -> tuple[Checkpoints, GPT2, torch.optim.AdamW]:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    policy, optimizer = policy_and_optimizer()
    checkpoints.save(7, policy, optimizer, {"trainer": {"best_value": 0.1 + 0.2}}, best_step=None)
    return checkpoints, policy, optimizer


def test_load_gives_the_same_bits_and_the_state(saved):
    checkpoints, policy, optimizer = saved
    other, other_optimizer = policy_and_optimizer(seed=1, steps=0)
    state = checkpoints.load(7, other, other_optimizer)
    assert state == {"step": 7, "trainer": {"best_value": 0.1 + 0.2}}
    assert_same_bits(tensors(policy, optimizer), tensors(other, other_optimizer))


def test_training_goes_on_from_a_checkpoint_to_the_same_bits(saved):
    checkpoints, policy, optimizer = saved
    other, other_optimizer = policy_and_optimizer(seed=1, steps=3)
    checkpoints.load(7, other, other_optimizer)
    for step in range(2):
        train_once(policy, optimizer, step)
        train_once(other, other_optimizer, step)
    assert_same_bits(tensors(policy, optimizer), tensors(other, other_optimizer))


def test_a_checkpoint_before_the_first_step_loads(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    policy, optimizer = policy_and_optimizer(steps=0)
    checkpoints.save(0, policy, optimizer, {}, best_step=None)
    other, other_optimizer = policy_and_optimizer(seed=1, steps=0)
    checkpoints.load(0, other, other_optimizer)
    assert_same_bits(tensors(policy, optimizer), tensors(other, other_optimizer))


def test_policy_loads_alone_and_as_a_pretrained_model(saved):
    checkpoints, policy, _ = saved
    other = tiny(seed=1)
    checkpoints.load(7, other)
    assert_same_bits(dict(policy.state_dict()), dict(other.state_dict()))
    again = GPT2.from_pretrained(str(checkpoints.directory / "step_00000007"))
    assert again.config == policy.config
    assert_same_bits(dict(policy.state_dict()), dict(again.state_dict()))


def test_every_file_is_json_or_safetensors_and_in_the_manifest(saved):
    checkpoints, *_ = saved
    path = checkpoints.directory / "step_00000007"
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert sorted(json.loads((path / "manifest.json").read_text())) == FILES[1:]
    for file in path.iterdir():
        start = file.read_bytes()[:9]
        assert start[:1] == b"{" or start[8:9] == b"{", f"{file.name} is neither JSON nor safetensors"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "flipped", "truncated", "empty"])
def test_a_harmed_file_is_refused_by_name(saved, name, harm):
    checkpoints, *_ = saved
    file = checkpoints.directory / "step_00000007" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.unlink()
    if harm != "missing":
        file.write_bytes({"flipped": data, "truncated": data[:-20], "empty": b""}[harm])
    other, other_optimizer = policy_and_optimizer(seed=1)
    before = tensors(other, other_optimizer)
    with pytest.raises(CheckpointError, match=str(file.parent)) as caught:
        checkpoints.load(7, other, other_optimizer)
    if not (name == "manifest.json" and harm == "flipped"):  # which names the file that no longer fits it
        assert name in str(caught.value)
    assert_same_bits(before, tensors(other, other_optimizer))


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_anywhere_in_the_manifest_is_refused_or_harmless(saved, bit):
    checkpoints, policy, _ = saved
    file = checkpoints.directory / "step_00000007" / "manifest.json"
    data = file.read_bytes()
    for place in range(0, len(data), 3):
        harmed = bytearray(data)
        harmed[place] ^= 1 << bit
        file.write_bytes(harmed)
        other = tiny(seed=1)
        try:
            checkpoints.load(7, other)
        except CheckpointError:
            continue
        assert_same_bits(dict(policy.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("sizes", [{"n_embd": 8}, {"n_layer": 2}, {"n_positions": 16}])
def test_the_checkpoint_of_another_model_is_refused(saved, sizes):
    checkpoints, *_ = saved
    other, other_optimizer = policy_and_optimizer(**({"n_positions": 32} | sizes))
    with pytest.raises(CheckpointError, match="step_00000007 does not fit the configured model"):
        checkpoints.load(7, other, other_optimizer)


def test_a_model_that_differs_in_what_no_shape_shows_is_refused(saved):
    checkpoints, policy, _ = saved
    sizes = policy.config_dict() | {"n_head": 4}
    del sizes["layer_norm_epsilon"]
    with pytest.raises(CheckpointError, match=r"step_00000007 does not fit the configured model.*n_head"):
        checkpoints.load(7, GPT2.from_config(**sizes))


def test_there_is_no_checkpoint_without_its_directory(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).steps() == []
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        Checkpoints(tmp_path / "none", keep=1).load(3, tiny())


def test_a_kill_at_any_moment_leaves_the_previous_checkpoint_or_the_new_one(saved, monkeypatch):
    checkpoints, policy, optimizer = saved
    old = tensors(policy, optimizer)
    perturbed(policy, seed=5, spread=0.1)
    new = tensors(policy, optimizer)
    seen, moments = set(), 0
    while True:  # killed at the first dangerous call, then the second, ... until a save gets through
        countdown = iter(range(moments, -1, -1))

        def or_killed(call, left=countdown):
            def wrapped(*args, **kwargs):
                if next(left) == 0:
                    raise Killed
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for place, name in ((checkpoint, "save_file"), (manifest, "fsync"), (checkpoint.os, "rename")):
                patch.setattr(place, name, or_killed(getattr(place, name)))
            patch.setattr(Path, "write_text", or_killed(Path.write_text))
            try:
                checkpoints.save(8, policy, optimizer, {}, best_step=None)
                break
            except (Killed, StopIteration):
                moments += 1
        newest = checkpoints.steps()[-1]
        seen.add(newest)
        other, other_optimizer = policy_and_optimizer(seed=1, steps=0)
        checkpoints.load(newest, other, other_optimizer)
        assert_same_bits(old if newest == 7 else new, tensors(other, other_optimizer))
        shutil.rmtree(checkpoints.directory / "step_00000008", ignore_errors=True)
    assert moments >= 10  # 2 tensor files, 2 JSON files, 4 fsyncs, directory, rename, parent
    assert seen == {7, 8}
    assert checkpoints.steps() == [7, 8]
    assert not list(checkpoints.directory.glob(".*"))


def test_a_leftover_temporary_directory_is_no_checkpoint_and_goes_with_the_next_save(saved):
    checkpoints, policy, optimizer = saved
    leftover = checkpoints.directory / ".step_00000009.tmp"
    shutil.copytree(checkpoints.directory / "step_00000007", leftover)
    assert checkpoints.steps() == [7]
    checkpoints.save(8, policy, optimizer, {}, best_step=None)
    assert not leftover.exists()


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    policy, optimizer = policy_and_optimizer(steps=1)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(step, policy, optimizer, {}, best_step=2 if step >= 2 else None)
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.save(6, policy, optimizer, {}, best_step=6)
    assert checkpoints.steps() == [5, 6]


def test_an_old_checkpoint_goes_only_after_the_new_one_is_there(saved, monkeypatch):
    checkpoints, policy, optimizer = saved
    checkpoints.keep = 1

    def killed(*args):
        raise Killed

    monkeypatch.setattr(checkpoint.os, "rename", killed)
    with pytest.raises(Killed):
        checkpoints.save(8, policy, optimizer, {}, best_step=None)
    assert checkpoints.steps() == [7]
    checkpoints.load(7, tiny(seed=1))
