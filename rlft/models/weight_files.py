"""Where weights come from: our checkpoints, Hugging Face directories, or the hub."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.paths import resolve

CONFIG_KEY = "config"  # the safetensors metadata entry under which our checkpoints hold the model's sizes


def read_weights(path: str) -> tuple[dict, dict[str, Tensor]]:
    """Return (config, weights by name) from a local directory or, failing that, from the hub name `path`.

    A directory with `policy.safetensors` is one of our checkpoints; one with `config.json` is Hugging Face's. Only
    safetensors files are read: nothing pickled is ever loaded. Raises `ConfigError` where nothing is found, and
    `CheckpointError` for a file that is damaged or not what its name says.
    """
    directory = local_directory(path)
    ours = directory / "policy.safetensors"
    if ours.is_file():
        weights, metadata = _read_file(ours)
        if CONFIG_KEY not in metadata:
            raise CheckpointError(f"{ours} is not one of our checkpoints: its metadata has no '{CONFIG_KEY}'")
        return json.loads(metadata[CONFIG_KEY]), weights
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"model.path={path}: neither policy.safetensors (one of our checkpoints) nor config.json (Hugging Face) "
            f"is in {directory}"
        )
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] if index.is_file() else {"all": "model.safetensors"}
    weights = {}
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            raise ConfigError(f"model.path={path}: {name} is missing (only safetensors are read, never pickles)")
        weights |= _read_file(directory / name)[0]
    return json.loads((directory / "config.json").read_text()), weights


def checkpoint_config(file: Path) -> dict:
    """Return the config in the `policy.safetensors` of our checkpoints; a transformers model's has a `model_type`."""
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {}).get(CONFIG_KEY, "{}"))
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def local_directory(path: str) -> Path:
    """Return the directory that `path` names: a package's, a local one, or one downloaded from the hub."""
    directory = Path(resolve(path))
    return directory if directory.is_dir() else _download(path)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle, no dict
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file (a Git LFS pointer?): {error}") from error


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges*", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path={name}: no such directory, and the model hub gave nothing ({type(error).__name__}). Give a "
            f"local directory (model.path=/dir with config.json and model.safetensors), or take the policy that ships "
            f"with rlft (model=tiny)"
        ) from error
