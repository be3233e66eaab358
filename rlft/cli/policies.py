"""What RUN or MODEL on a command line names: a policy's weights, its tokenizer, and the run that trained it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlft import build
from rlft.config import RootConfig
from rlft.errors import ConfigError
from rlft.models.base import CausalLM
from rlft.models.files import checkpoint_config, local_directory
from rlft.saved_config import from_run, read_config
from rlft.text.tokenizer import Tokenizer
from rlft.trainer.checkpoint import Checkpoints, verify

HELP = "a run directory, one of its checkpoints, a model in Hugging Face format, or a name on its hub"


@dataclass(frozen=True)
class NamedPolicy:
    """A policy that a command line names."""

    name: str  # as it was given
    weights: Path
    node: dict[str, Any]  # what loads it, as conf/model/ has it: _target_, path and tokenizer
    run: RootConfig | None  # the settings of the run that trained it; None for a model of elsewhere

    def load(self) -> tuple[CausalLM, Tokenizer]:
        """Return the policy, in evaluation mode, and its tokenizer."""
        policy, tokenizer = build.policy(self.node)
        return policy.eval(), tokenizer

    def settings(self, base: RootConfig) -> RootConfig:
        """Return `base` with this policy as it was before training, so that reference=initial means what it meant.

        A model of elsewhere has no such reference; its KL to itself would be 0, and so none is measured.
        """
        if self.run is not None:
            return replace(base, model=self.run.model | {"tokenizer": self.node["tokenizer"]})
        reference, algo = base.reference, base.algo
        if reference["_target_"].endswith(".initial"):
            reference = {"_target_": "rlft.models.reference.none"}
            if "kl" in algo:
                algo = algo | {"kl": algo["kl"] | {"coef": 0.0}}
        return replace(base, model=self.node, reference=reference, algo=algo)


def named_policy(name: str, *, trusted: tuple[str, ...] = ()) -> NamedPolicy:
    """Return what `name` stands for.

    Of a run that is done it is the policy that it exported, of any other run the newest checkpoint. `trusted` are
    modules beside rlft's that the run's config.yaml may name. Raises `ConfigError` where there is no policy,
    `CheckpointError` for a damaged one.
    """
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        run_dir, weights = path, _newest(path)
    elif (path / "policy.safetensors").is_file() and (path.absolute().parents[1] / "config.yaml").is_file():
        verify(path)
        run_dir, weights = path.absolute().parents[1], path
    else:
        weights = local_directory(name)
        return NamedPolicy(name, weights, _node(weights, _tokenizer(weights)), None)
    run = from_run(read_config(run_dir), run_dir=run_dir, trusted=trusted)
    has_tokenizer = (run_dir / "model" / "tokenizer.json").is_file()  # needs neither the run's data nor a download
    tokenizer = _tokenizer(run_dir / "model") if has_tokenizer else run.model["tokenizer"]
    return NamedPolicy(name, weights, _node(weights, tokenizer), run)


def _tokenizer(directory: Path) -> dict[str, Any]:
    return {"_target_": "rlft.text.huggingface.huggingface", "path": str(directory)}


def _node(weights: Path, tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": _loader(weights), "path": str(weights), "tokenizer": tokenizer}


def _newest(run_dir: Path) -> Path:
    if (run_dir / "summary.json").is_file() and (run_dir / "model").is_dir():
        return run_dir / "model"
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=1)
    if not checkpoints.steps():
        raise ConfigError(f"{run_dir} is a run without a checkpoint so far: go on with it by resume=true")
    newest = checkpoints.path(checkpoints.steps()[-1])
    verify(newest)
    return newest


def _loader(weights: Path) -> str:
    """Return the path of the class method that loads these weights."""
    if (weights / "policy.safetensors").is_file():
        is_gpt2 = "model_type" not in checkpoint_config(weights / "policy.safetensors")
    elif (weights / "config.json").is_file():
        is_gpt2 = json.loads((weights / "config.json").read_text()).get("model_type") == "gpt2"
    else:
        raise ConfigError(
            f"{weights} holds no policy: there is neither config.yaml, policy.safetensors nor config.json"
        )
    return f"rlft.models.{'gpt2.GPT2' if is_gpt2 else 'hf.HFCausalLM'}.from_pretrained"
