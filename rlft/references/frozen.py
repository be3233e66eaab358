"""Frozen references against which KL is measured; `bigram.py` beside this file has one that is counted from data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.paths import resolve
from rlft.core.ranges import CountOrZero
from rlft.data.encode import Encoder
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.text.huggingface import huggingface


def initial(policy: CausalLM) -> CausalLM:
    """Return a frozen copy of `policy` as it is now; a resumed run copies the same starting weights."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def none(policy: CausalLM) -> None:
    """No reference."""


def random(policy: CausalLM, *, seed: CountOrZero) -> CausalLM:
    """Return a frozen model of the policy's architecture with the fresh weights of `seed`.

    Raises `ConfigError` where these are the policy's own weights, or where the policy is no GPT-2.
    """
    if not isinstance(policy, GPT2):
        raise ConfigError(
            f"reference=random draws the weights of a GPT-2, and the policy is a {type(policy).__name__}: take "
            f"reference=initial, bigram or none"
        )
    model = GPT2(policy.config, seed=seed).to(policy.head_weight)
    if torch.equal(model.head_weight, policy.head_weight):
        raise ConfigError(f"reference.seed={seed} gives the policy's own weights: take another seed")
    return model.requires_grad_(False).eval()


def checkpoint(policy: CausalLM, *, tokenizer: Encoder, path: str) -> CausalLM:
    """Return the frozen model at `path`, of the policy's class: a run's checkpoint, an exported one, or a hub name.

    Its vocabulary must be the policy's: the size is always checked, and the tokens where a local directory has a
    `tokenizer.json` (`<run directory>/model` has one, a checkpoint of ours has none).

    Raises `ConfigError` for another vocabulary, a context shorter than the policy's, or a path without a model, and
    `CheckpointError` for a damaged one.
    """
    kind: Any = type(policy)
    try:
        model = kind.from_pretrained(path)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(str(error).replace("model.path", "reference.path")) from error
    if model.vocab_size != policy.vocab_size:
        raise ConfigError(
            f"reference.path={path} has a vocabulary of {model.vocab_size}, the policy one of {policy.vocab_size}: a "
            f"KL is between distributions over the same tokens"
        )
    if model.context_length < policy.context_length:
        raise ConfigError(
            f"reference.path={path} has {model.context_length} positions, the policy {policy.context_length}: what is "
            f"longer could not be scored. Take a reference with at least as many"
        )
    _check_tokens(path, tokenizer)
    return model.to(policy.head_weight).requires_grad_(False).eval()


def _check_tokens(path: str, tokenizer: Encoder) -> None:
    if not (Path(resolve(path)) / "tokenizer.json").is_file():
        return
    ours, theirs = tokenizer.vocab, huggingface(path).vocab
    differ = sorted({token for token, _ in ours.items() ^ theirs.items()})
    if differ:
        raise ConfigError(
            f"reference.path={path} has another tokenizer than the policy (they differ in {len(differ)} tokens, as in "
            f"{differ[0]!r}): a KL is between distributions over the same tokens"
        )
