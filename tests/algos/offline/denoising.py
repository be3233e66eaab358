"""What the tests of masked diffusion are made of: a bidirectional policy with uneven predictions, and fixed text."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.algos.offline.denoise import Denoise
from rlft.data.text import TextData
from rlft.models.gpt2 import GPT2, GPT2Config
from tests.builders import FixedText, run_of
from tests.models.tiny import shaken

MASK = 12  # the id behind the tokenizer's twelve
BLOCK = [3, 7, 0, 7, 2]  # one token is given, four can be hidden


class Text(FixedText, TextData):
    """Fixed blocks that pass for plain text."""

    counts: dict[str, int] = {}  # noqa: RUF012  FixedText sets its own; TextData's is a property
    holds_out = True


def bidirectional(seed: int = 0, *, vocab_size: int = 12, n_positions: int = 32) -> GPT2:
    """Predictions of several nats that depend on all the tokens around."""
    return shaken(GPT2(GPT2Config(vocab_size, n_positions, 16, 2, 2, is_causal=False)).double(), seed).eval()


def random_blocks(count: int, size: int, *, seed: int) -> Tensor:
    return torch.randint(0, 12, (count, size), generator=torch.Generator().manual_seed(seed))


def denoise(policy: GPT2, data: Text, *, cls: type[Denoise] = Denoise, **changes) -> Denoise:
    settings = {
        "rows_per_step": 4, "eval_blocks": None, "eval_levels": 2, "sample_rounds": 3, "sample_order": "confidence",
    }  # fmt: skip
    own = {name: changes.pop(name, value) for name, value in settings.items()}
    return cls(run_of(policy, data, **({"max_new_tokens": 32} | changes)), **own)


def one_block(ids: list[int] = BLOCK, **changes) -> Denoise:
    block = torch.tensor([ids])
    return denoise(bidirectional(), Text(block, block), **changes)
