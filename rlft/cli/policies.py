"""Finds the policy that a command line names: its weights, its tokenizer, and the run that trained it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlft import build
from rlft.config import RootConfig
from rlft.core.errors import ConfigError
from rlft.core.manifest import verify
from rlft.models.base import CausalLM
from rlft.models.weight_files import checkpoint_config, local_directory
from rlft.saved_config import from_run, read_config
from rlft.text.tokenizer import Tokenizer
from rlft.trainer.checkpoint import Checkpoints


@dataclass(frozen=True)
class NamedPolicy:
    """A policy that a command line names."""

    name: str  # as it was given
    weights: Path
    run_dir: Path | None  # of the run that trained it; None for a model that no run trained
    checkpoint: Path | None  # has the weights of its head, if it has one
    trusted: tuple[str, ...] = ()  # modules outside rlft that the run's config.yaml may name

    @cached_property
    def run(self) -> RootConfig | None:
        """The settings of its run, read on first use: sampling must not need the run's rewards."""
        if self.run_dir is None:
            return None
        return from_run(read_config(self.run_dir), run_dir=self.run_dir, trusted=self.trusted)

    @cached_property
    def node(self) -> dict[str, Any]:
        """The settings that load it, as in conf/model/: _target_, path and tokenizer."""
        place = self.weights if self.run_dir is None else self.run_dir / "model"
        if self.run_dir is None or (place / "tokenizer.json").is_file():  # needs neither the run's data nor a download
            tokenizer: Any = {"_target_": "rlft.text.huggingface.huggingface", "path": str(place)}
        else:
            assert self.run is not None
            tokenizer = self.run.model["tokenizer"]
        return {"_target_": _loader(self.weights), "path": str(self.weights), "tokenizer": tokenizer}

    def load(self) -> tuple[CausalLM, Tokenizer]:
        """Return the policy, in evaluation mode, and its tokenizer."""
        policy, tokenizer = build.policy(self.node)
        return policy.eval(), tokenizer

    def head(self) -> dict[str, Tensor]:
        """Return the weights of the head that was trained with the policy: a critic, a reward head or a classifier."""
        if self.checkpoint is None:
            raise ConfigError(f"{self.name} has no checkpoint, and so no head to evaluate: name its run")
        return load_file(self.checkpoint / "head.safetensors")

    def settings(self, base: RootConfig) -> RootConfig:
        """Return `base` with this policy as it was before training, which reference=initial refers to.

        A model that no run trained has no such reference: its KL to itself would be 0, so none is measured.
        """
        if self.run is not None:
            return replace(base, model=self.run.model | {"tokenizer": self.node["tokenizer"]})
        reference, algo = base.reference, base.algo
        if reference["_target_"].endswith(".initial"):
            reference = {"_target_": "rlft.references.frozen.none"}
            if "kl" in algo:
                algo = algo | {"kl": algo["kl"] | {"coef": 0.0}}
        return replace(base, model=self.node, reference=reference, algo=algo)


def named_policy(name: str, *, trusted: tuple[str, ...] = ()) -> NamedPolicy:
    """Return the policy that `name` stands for.

    For a finished run it is the policy that the run exported, for any other run that of the newest checkpoint.
    `trusted` are modules outside rlft that the run's config.yaml may name. Raises `ConfigError` if there is no policy,
    `CheckpointError` if it is damaged.
    """
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        weights, checkpoint = _of_run(path)
        return NamedPolicy(name, weights, path, checkpoint, trusted)
    run_dir = path.absolute().parents[1] if len(path.absolute().parents) > 1 else path
    if (path / "policy.safetensors").is_file() and (run_dir / "config.yaml").is_file():
        verify(path)
        return NamedPolicy(name, path, run_dir, path, trusted)
    try:
        return NamedPolicy(name, local_directory(name), None, None)
    except ConfigError as error:
        why = " ".join(str(error).replace("model.path=", "").split())
        raise ConfigError(f"{name} is no run directory, checkpoint or model: {why}") from error


def _of_run(run_dir: Path) -> tuple[Path, Path | None]:
    """Return the directory of a run's policy, and the checkpoint of the same step."""
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=1)
    steps = checkpoints.steps()
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        summary = {}
    if summary.get("steps") == (steps[-1] if steps else 0) and (run_dir / "model").is_dir():
        # A run that stopped early exported its best policy.
        step = summary["best"]["step"] if summary["exit_reason"] == "early_stopping" else summary["steps"]
        return run_dir / "model", checkpoints.path(step) if step in steps else None
    if not steps:
        raise ConfigError(f"{run_dir} is a run without a checkpoint so far: go on with it by resume=true")
    newest = checkpoints.path(steps[-1])
    verify(newest)
    return newest, newest


def _loader(weights: Path) -> str:
    """Return the path of the class method that loads these weights."""
    if (weights / "policy.safetensors").is_file():
        is_gpt2 = "model_type" not in checkpoint_config(weights / "policy.safetensors")
    elif (weights / "config.json").is_file():
        is_gpt2 = json.loads((weights / "config.json").read_text()).get("model_type") == "gpt2"
    else:
        raise ConfigError(f"{weights} holds no policy: no config.yaml, policy.safetensors or config.json is there")
    return f"rlft.models.{'gpt2.GPT2' if is_gpt2 else 'hf.HFCausalLM'}.from_pretrained"
