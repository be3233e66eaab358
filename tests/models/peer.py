"""transformers' GPT-2 as the peer: built from a config with weights of our choosing, no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from tests.models.tiny import shaken


def peer(
    seed: int = 0,
    *,
    vocab_size: int = 19,
    n_positions: int = 24,
    n_embd: int = 16,
    n_layer: int = 2,
    n_head: int = 2,
    **others: Any,
) -> GPT2LMHeadModel:
    """Their GPT-2 in float32, in evaluation mode, with logits of several nats."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        bos_token_id=None,
        eos_token_id=None,
        **others,
    )
    return shaken(GPT2LMHeadModel(config), seed).eval()


def saved(model: GPT2LMHeadModel, directory: Path, **how: Any) -> str:
    """Save as Hugging Face does and return the path."""
    model.save_pretrained(directory, **how)
    return str(directory)
