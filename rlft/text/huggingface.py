"""Any tokenizer in Hugging Face format: a directory, one inside an installed package, or a name on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from rlft.core.errors import ConfigError
from rlft.core.paths import resolve
from rlft.text.backend import BackendTokenizer, with_post_processor
from rlft.text.tokenizer import Tokenizer

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that use a tokenizer.json unchanged
_OF_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Settings of a tokenizer_config.json that change neither encoding nor decoding.
_OF_FILES = ("backend", "is_local", "local_files_only", "tokenizer_class")
_HARMLESS = (*_OF_FILES, "chat_template", "model_input_names", "model_max_length", "padding_side", "truncation_side")


def huggingface(path: str) -> Tokenizer:
    """Return the tokenizer at `path`.

    Arguments:
        path: a directory with a `tokenizer.json`, `package:<package>/<directory>`, or a hub name such as "gpt2".

    Code that comes with a tokenizer is never run. Raises `ConfigError` if there is no such tokenizer, if the hub cannot
    be reached, or if the tokenizer has no fast version.
    """
    found = resolve(path)
    if isinstance(found, Path) and (plain := _plain(found)) is not None:
        backend, eos_token = plain
        return BackendTokenizer(backend, eos_token=eos_token, make_hf=lambda: _auto(path, found), name=f"path={path!r}")
    return BackendTokenizer.of(_auto(path, found))


def load_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that `from_pretrained` of `transformers` raises if there are no files or no network."""
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's client passes on the errors of its HTTP library, which is httpx, or httpx2 from its release 2 on.
    of_http = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return OSError, ValueError, KeyError, ImportError, of_http


def _plain(directory: Path) -> tuple[tokenizers.Tokenizer, str | None] | None:
    """Return the backend and the end token if the tokenizer can be loaded without `transformers`, else None.

    It can be if its `tokenizer.json` says everything: its class is generic, no setting changes it, it holds all special
    tokens, and the model in the directory, if any, is a GPT-2 (`AutoTokenizer` makes exceptions for others).
    """
    file = directory / "tokenizer.json"
    if not file.is_file() or any(
        (directory / f"{name}.json").exists() for name in ("special_tokens_map", "added_tokens")
    ):
        return None
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        model = directory / "config.json"
        model_type = json.loads(model.read_text(encoding="utf-8")).get("model_type") if model.exists() else "gpt2"
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception:  # `tokenizers` raises plain Exception; AutoTokenizer will say what is wrong
        return None
    tokens = [config[name] for name in _OF_TOKENS if config.get(name) is not None]
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    is_plain = (
        config.get("tokenizer_class") in _GENERIC
        and model_type == "gpt2"
        and config.keys() <= {*_OF_TOKENS, *_HARMLESS}
        and all(isinstance(token, str) and token in special for token in tokens)
    )
    return (with_post_processor(backend), config.get("eos_token")) if is_plain else None


def _auto(path: str, found: Path | str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(found), use_fast=True, trust_remote_code=False)
    except load_errors() as error:
        if not isinstance(found, str):
            raise ConfigError(
                f"path={path!r}: {found} holds no tokenizer that can be loaded ({_first_line(error)}); it must hold "
                f"a tokenizer.json, as tokenizer.save_pretrained writes it"
            ) from error
        raise ConfigError(
            f"path={path!r} is no local directory, and could not be had from the Hugging Face hub "
            f"({_first_line(error)}). Ways on: check the name; where the hub can be reached, log in if the model is "
            f"gated; give a local directory; or take model=tiny, which ships with its own tokenizer. HF_HUB_OFFLINE=1 "
            f"says this at once instead of after retries"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
