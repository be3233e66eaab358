"""Checkpoints that are complete or absent.

A checkpoint is written into a temporary directory, each file is fsynced, a manifest with sizes and SHA-256 sums comes
last, then the directory is renamed into place and its parent fsynced; older ones go only after that. A kill at any
moment leaves the previous checkpoint or the new one. Weights and optimizer state are safetensors, the rest is JSON:
nothing pickled is ever written or loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlft.core import manifest
from rlft.core.errors import CheckpointError
from rlft.models.base import CausalLM
from rlft.models.weight_files import CONFIG_KEY

_PREFIX = "step_"


class Checkpoints:
    """The checkpoints of one run: `keep` newest ones, and the best one."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def save(
        self,
        step: int,
        policy: CausalLM,
        optimizer: torch.optim.Optimizer,
        state: dict,
        *,
        best_step: int | None,
        head: nn.Module | None = None,
    ) -> Path:
        """Write `step_<step>` whole, then drop those that are neither among the newest nor the best."""
        final = self.path(step)
        temporary = self.directory / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        metadata = {CONFIG_KEY: json.dumps(policy.config_dict())}
        save_file(_weights(policy), temporary / "policy.safetensors", metadata=metadata)
        if head is not None:
            save_file(_weights(head), temporary / "head.safetensors")
        save_file(_flatten(optimizer.state_dict()["state"]), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step} | state, indent=1))
        manifest.write(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        manifest.fsync(self.directory)
        self._drop_old(best_step)
        return final

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint, whether it is there or not."""
        return self.directory / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        found = self.directory.glob(f"{_PREFIX}*")
        return sorted(int(path.name.removeprefix(_PREFIX)) for path in found if path.name[len(_PREFIX) :].isdigit())

    def state(self, step: int) -> dict:
        """Return the state of a checkpoint, verified, without its weights; raises `CheckpointError`."""
        path = self.path(step)
        manifest.verify(path)
        return json.loads((path / "state.json").read_text())

    def load(
        self,
        step: int,
        policy: CausalLM,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        head: nn.Module | None = None,
    ) -> dict:
        """Load a verified checkpoint into `policy`, `optimizer` and `head` and return its state.

        Raises `CheckpointError` where a file is missing, has another size or sum, or does not fit the model.
        """
        path = self.path(step)
        state = self.state(step)
        _check_config(path, policy)
        try:
            weights = load_file(path / "policy.safetensors")
            policy.load_state_dict(weights)
            if head is not None:
                head.load_state_dict(load_file(path / "head.safetensors"))
            if optimizer is not None:
                _restore(optimizer, load_file(path / "optimizer.safetensors"), path)
        except (RuntimeError, FileNotFoundError, SafetensorError) as error:
            raise CheckpointError(f"{path} does not fit the configured model: {error}") from error
        return state

    def _drop_old(self, best_step: int | None) -> None:
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best_step:
                shutil.rmtree(self.path(step))
        for leftover in self.directory.glob(f".{_PREFIX}*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_config(path: Path, policy: CausalLM) -> None:
    """Refuse a checkpoint of another architecture, even where all shapes agree (GPT-2's n_head changes no shape)."""
    with safe_open(path / "policy.safetensors", framework="pt") as file:
        saved = json.loads(file.metadata()[CONFIG_KEY])
    ours = json.loads(json.dumps(policy.config_dict()))
    if saved != ours:
        differ = [f"{k}={saved.get(k)} (configured: {v})" for k, v in ours.items() if saved.get(k) != v]
        raise CheckpointError(f"{path} does not fit the configured model: it has {', '.join(differ) or saved}")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def _flatten(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{i}.{key}": value.contiguous() for i, entry in state.items() for key, value in entry.items()}


def _restore(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor], path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        shapes = {k: t.shape for k, t in state.get(i, {}).items() if t.dim()}
        if any(shape != parameter.shape for shape in shapes.values()):
            raise CheckpointError(f"{path}: optimizer state {i} has shapes {shapes}, needs {list(parameter.shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
