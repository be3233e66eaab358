"""From the checked configuration to objects: the only file that instantiates.

What is cheap and can fail comes first (hardware, the algorithm's check, data), then weights, then the algorithm.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from rlft.algos.base import Algorithm, Run, Setup
from rlft.config import RootConfig, check_group
from rlft.core.errors import ConfigError, RlftError, nearest
from rlft.core.metrics import Clock
from rlft.core.paths import conf_directory
from rlft.core.settings import gathered, parameters_of
from rlft.data.kinds import check_columns, check_kind
from rlft.models.base import CausalLM
from rlft.references.frozen import initial as initial_reference
from rlft.references.frozen import none as no_reference
from rlft.rewards.compose import RewardSum
from rlft.text.tokenizer import Tokenizer
from rlft.tracking.progress import Progress
from rlft.tracking.trackers import Tracker
from rlft.trainer.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator  # takes a while to import

CONF = conf_directory()


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, wired."""

    run: Run
    algorithm: Algorithm
    accelerator: Accelerator
    tracker: Tracker


def build(config: RootConfig) -> Job:
    """Build every part of a run. Raises `ConfigError`, `DataError` or `CheckpointError` naming the setting."""
    accelerator = _instantiate(config.hardware).accelerator()
    torch.manual_seed(config.seed)
    tracker = _instantiate(config.tracker)
    make_algorithm = _parts(config.algo)
    kind: Any = make_algorithm.func
    check_kind(kind, get_method(config.data["_target_"]))
    if isinstance(source := config.data.get("source"), dict) and "_target_" in source:
        check_columns(config.data, get_method(source["_target_"]))
    kind.check(_setup(config, world_size=accelerator.num_processes), **make_algorithm.keywords)
    tokenizer = _tokenizer(config.model)
    data = _instantiate(config.data, tokenizer=tokenizer)
    rewards = _rewards(config.reward) if kind.uses_rewards else None
    clock = Clock(accelerator.device)
    policy = _policy(config.model, tokenizer).to(accelerator.device)
    reference = None
    if kind.uses_reference(**make_algorithm.keywords):
        reference = _reference(config.reference, policy=policy, data=data, tokenizer=tokenizer)
    run = Run(
        settings=config,
        policy=policy,
        tokenizer=tokenizer,
        data=data,
        reference=reference,
        rewards=rewards,
        device=accelerator.device,
        autocast=accelerator.autocast,
        is_float32=accelerator.mixed_precision == "no" and not torch.backends.cuda.matmul.allow_tf32,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        clock=clock,
    )
    return Job(run, make_algorithm(run), accelerator, tracker)


def _setup(config: RootConfig, *, world_size: int) -> Setup:
    """Return what is known of a run before anything is loaded."""
    make, path = get_method(config.reference["_target_"]), config.reference.get("path")
    is_same_path = path is not None and path == config.model.get("path")
    is_initial = make is initial_reference or is_same_path
    return Setup(config, has_reference=make is not no_reference, is_reference_initial=is_initial, world_size=world_size)


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


def algorithm(node: dict[str, Any], run: Run, **parts: Any) -> Any:
    """Return the algorithm of a composed node for a run; `parts` replace parts that the node names.

    Raises `ConfigError` for what does not go together, as `build` does.
    """
    check_group("algo", node)
    make = _parts(node, **parts)
    setup = Setup(run.settings, has_reference=run.reference is not None, world_size=run.world_size)
    kind: Any = make.func
    kind.check(setup, **make.keywords)
    return make(run)


def trainer(job: Job, *, run_dir: Path, progress: Progress) -> Trainer:
    """Return the trainer of a built job; moves nothing and loads nothing."""
    return Trainer(
        job.run,
        job.algorithm,
        accelerator=job.accelerator,
        run_dir=run_dir,
        tracker=job.tracker,
        progress=progress,
    )


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


def _reference(node: dict, **available: Any) -> CausalLM | None:
    """Return the reference, made from those of the available objects that its function names.

    rlft/config.py has already refused a function that asks for anything else.
    """
    names = parameters_of(get_method(node["_target_"]))
    for name in names.keys() - node.keys() - available.keys():
        if hint := nearest(name, available):  # a misspelt name would keep its default in silence
            raise ConfigError(f"{node['_target_']} takes '{name}'{hint}; set reference.{name} if it is a setting")
    return _instantiate(node, **{name: value for name, value in available.items() if name in names})


def _instantiate(node: dict, **given: Any) -> Any:
    return _parts(node)(**given)


def _parts(node: dict, **replaced: Any) -> functools.partial:
    """Return a node's callable with its settings and nested parts; an `RlftError` that Hydra wrapped is raised itself.

    What the run gives is passed at the call: Hydra would try to turn it into configuration nodes.
    """
    try:
        made = instantiate(node | {"_partial_": True}, _convert_="all")
        return functools.partial(made.func, **gathered(made.func, made.keywords | replaced))
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, RlftError):
                raise cause from error
            cause = cause.__cause__
        raise ConfigError(f"{node.get('_target_')}: {' '.join(str(error).split())}") from error
