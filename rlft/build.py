"""From the checked configuration to objects: the only file that instantiates.

Order: what is cheap and can fail comes first (hardware, data), then weights, then the algorithm that wires them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from rlft.algos.base import Algorithm
from rlft.config import GIVEN, RootConfig
from rlft.core.errors import ConfigError, RlftError
from rlft.core.metrics import Clock
from rlft.core.paths import conf_directory
from rlft.data.kinds import check_columns, check_kind
from rlft.models.base import CausalLM
from rlft.references.frozen import initial as initial_reference
from rlft.references.frozen import none as no_reference
from rlft.rewards.compose import RewardSum
from rlft.rollout.sampling import Sampling
from rlft.text.tokenizer import Tokenizer
from rlft.tracking.progress import Progress
from rlft.tracking.trackers import Tracker
from rlft.trainer.settings import TrainSettings
from rlft.trainer.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator  # takes a while to import

CONF = conf_directory()


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, wired."""

    accelerator: Accelerator
    policy: CausalLM
    tokenizer: Tokenizer
    algorithm: Algorithm
    tracker: Tracker
    clock: Clock


def build(config: RootConfig) -> Job:
    """Build every part of a run. Raises `ConfigError`, `DataError` or `CheckpointError` naming the setting."""
    accelerator = _instantiate(config.hardware).accelerator()
    torch.manual_seed(config.seed)
    tracker = _instantiate(config.tracker)
    make_algorithm = _parts(config.algo)
    make_reference, reference_path = get_method(config.reference["_target_"]), config.reference.get("path")
    is_same_path = reference_path is not None and reference_path == config.model.get("path")
    algorithm_type: Any = make_algorithm.func
    check_kind(algorithm_type, get_method(config.data["_target_"]))
    if isinstance(source := config.data.get("source"), dict) and "_target_" in source:
        check_columns(config.data, get_method(source["_target_"]))
    algorithm_type.check(
        has_reference=make_reference is not no_reference,
        is_reference_initial=make_reference is initial_reference or is_same_path,
        world_size=accelerator.num_processes, **make_algorithm.keywords,
    )  # fmt: skip
    tokenizer = _tokenizer(config.model)
    data = _instantiate(config.data, tokenizer=tokenizer)
    wanted = inspect.signature(make_algorithm.func).parameters
    rewards = _rewards(config.reward) if "rewards" in wanted else None
    clock = Clock(accelerator.device)
    policy = _policy(config.model, tokenizer).to(accelerator.device)
    available: dict[str, Any] = {
        "policy": policy,
        "data": data,
        "tokenizer": tokenizer,
        "sampling": Sampling(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, max_rows=config.rollout_rows
        ),
        "seed": config.seed,
        "device": accelerator.device,
        "autocast": accelerator.autocast,
        "is_float32": accelerator.mixed_precision == "no" and not torch.backends.cuda.matmul.allow_tf32,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "clock": clock,
        "rewards": rewards,
    }
    if "reference" in wanted:
        available["reference"] = _wired(config.reference, {name: available[name] for name in GIVEN["reference"]})
    algorithm = make_algorithm(**{name: value for name, value in available.items() if name in wanted})
    return Job(accelerator, policy, tokenizer, algorithm, tracker, clock)


def algorithm_node(name: str, overrides: Sequence[str] = (), **sizes: Any) -> dict[str, Any]:
    """Return conf/algo/<name>.yaml composed with its groups, resolved, as plain values.

    `overrides` are as on the command line; `sizes` are the root settings that the YAML refers to. Raises `ConfigError`
    for a name or an override that does not exist.
    """
    if not (CONF / "algo").is_dir():
        raise ConfigError(f"the algorithms' YAML files are not in {CONF}: install rlft again")
    roots = [f"+{key}={'null' if value is None else value}" for key, value in sizes.items()]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(overrides=[f"+algo={name}", *roots, *overrides])
            values: Any = OmegaConf.to_container(config, resolve=True)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return values["algo"]


def algorithm(node: dict[str, Any], **objects: Any) -> Any:
    """Return the algorithm of a composed node, wired with the run's objects (`GIVEN["algo"]` in rlft/config.py)."""
    return _instantiate(node, **objects)


def trainer(job: Job, config: RootConfig, *, run_dir: Path, progress: Progress) -> Trainer:
    """Return the trainer of a built job; moves nothing and loads nothing."""
    return Trainer(
        job.policy, job.algorithm, settings=train_settings(config), accelerator=job.accelerator, run_dir=run_dir,
        tracker=job.tracker, progress=progress, clock=job.clock,
    )  # fmt: skip


def train_settings(config: RootConfig) -> TrainSettings:
    """Return those of the root settings that the loop reads."""
    return TrainSettings(**{field.name: getattr(config, field.name) for field in fields(TrainSettings)})


def policy(node: dict[str, Any]) -> tuple[CausalLM, Tokenizer]:
    """Return the policy of a node such as conf/model/ has, on the CPU, and its tokenizer."""
    tokenizer = _tokenizer(node)
    return _policy(node, tokenizer), tokenizer


def _tokenizer(model: dict[str, Any]) -> Tokenizer:
    if model.get("tokenizer") is None:
        raise ConfigError("model.tokenizer is not set; every model names its tokenizer")
    return _instantiate(model["tokenizer"])


def _policy(model: dict[str, Any], tokenizer: Tokenizer) -> CausalLM:
    made: CausalLM = _instantiate({key: value for key, value in model.items() if key != "tokenizer"})
    if tokenizer.vocab_size > made.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {made.vocab_size}")
    return made


def _rewards(node: dict[str, dict]) -> RewardSum:
    if not node:
        raise ConfigError("this algorithm needs a reward: reward=sentiment, or several: reward=[sentiment,length]")
    plain = {name: {k: v for k, v in one.items() if k not in ("weight", "timeout")} for name, one in node.items()}
    return RewardSum(
        {name: _instantiate(one) for name, one in plain.items()},
        weights={name: one.get("weight", 1.0) for name, one in node.items()},
        timeouts={name: one.get("timeout", 60.0) for name, one in node.items()},
    )


def _wired(node: dict, available: dict[str, Any]) -> Any:
    """Instantiate a node with those of the available objects that its callable names."""
    wanted = inspect.signature(get_method(node["_target_"])).parameters
    return _instantiate(node, **{name: value for name, value in available.items() if name in wanted})


def _instantiate(node: dict, **given: Any) -> Any:
    return _parts(node)(**given)


def _parts(node: dict) -> functools.partial:
    """Return a node's callable with its settings and built parts; an error of ours under Hydra's is raised as itself.

    What the run gives is passed at the call: Hydra would try to make configuration nodes of it.
    """
    try:
        return instantiate(node | {"_partial_": True}, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, RlftError):
                raise cause from error
            cause = cause.__cause__
        raise ConfigError(f"{node.get('_target_')}: {' '.join(str(error).split())}") from error
