"""GPT-2's byte-level BPE of 50,257 tokens (Radford et al., "Language models are unsupervised multitask learners",
2019), through `tiktoken`.

tiktoken downloads the vocabulary once and keeps it (`TIKTOKEN_CACHE_DIR`). Without network, it can be read from a
directory with the published files, in OpenAI's form or in Hugging Face's. A hash decides whether a vocabulary is
GPT-2's, so the ids never differ from the published ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError
from rlft.core.paths import resolve
from rlft.text.huggingface import huggingface
from rlft.text.tokenizer import Tokenizer

EOS = "<|endoftext|>"
VOCAB_SIZE = 50257
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # the hub's names of GPT-2's models
_FILES = ("tokenizer.json", "vocab.json", "encoder.json")  # any of these holds the vocabulary
_MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
_ANY_TOKENIZER = (*_FILES, "tokenizer_config.json", "tokenizer.model", "vocab.txt", "spiece.model")
_TOKENS_SHA256 = "3b27ee95684e28911415c6bcd8537b0d5b950f05a84053d4e6c63a26990f9617"  # of GPT-2's tokens, by `_digest`
# `BackendTokenizer.fingerprint` of GPT-2's tokenizer, as a constant because that takes a second to build. With one
# fingerprint for both, what was cached with one of the two tokenizers is found with the other.
_FINGERPRINT = "2f0f73080f2c17868c8313d6a382f5aff6dfa9e9e0d6f75d8909f39137d55d18"
# tiktoken's pattern runs out of stack at about a million white-space characters that are followed by another character.
_LONG = 100_000
_SPACES = re.compile(rf"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{_LONG},}}+")


def gpt2_bpe(*, path: str | None = None, model: str | None = None) -> Tokenizer:
    """Return GPT-2's tokenizer; "<|endoftext|>" is the last id, 50256.

    Arguments:
        path: a directory with the published files: `vocab.bpe` and `encoder.json`, `vocab.json` and `merges.txt`, or a
            `tokenizer.json`. None: tiktoken's cache, or the network.
        model: the model's path. If it is not one of OpenAI's models and has a tokenizer of its own, that tokenizer is
            returned; through tiktoken, and without network, if it is GPT-2's.

    Raises `ConfigError` if `path` holds another tokenizer, if the model's own tokenizer differs from it, or if there
    are neither files nor network.
    """
    given = None if path is None else _published(path)
    if model is None or (model.removeprefix("openai-community/") in OPENAI and not Path(model).exists()):
        return given or Tiktoken(_downloaded())
    own = resolve(model)
    if isinstance(own, str):  # another model on the hub
        return given or huggingface(model)
    if not any((own / name).exists() for name in _ANY_TOKENIZER):
        return given or Tiktoken(_downloaded())
    tokens = _tokens(own)
    if tokens is not None and _digest(tokens) == _TOKENS_SHA256:
        is_openais_form = not any((own / name).exists() for name in ("tokenizer.json", "vocab.json"))
        return Tiktoken(_encoding(tokens), make_hf=None if is_openais_form else lambda: huggingface(model).hf)
    if given is not None:
        raise ConfigError(
            f"model.tokenizer.path={path} holds GPT-2's tokens, and the model at {own} has a tokenizer of its own with "
            f"other ids: leave model.tokenizer.path out"
        )
    return huggingface(model)


class Tiktoken(Tokenizer):
    """An encoding of `tiktoken` behind our interface.

    Arguments:
        encoding: a `tiktoken.Encoding` whose last token is "<|endoftext|>".
        make_hf: makes the `transformers` tokenizer with the same ids; None: `GPT2Tokenizer`.
    """

    def __init__(self, encoding: Any, *, make_hf: Callable[[], Any] | None = None) -> None:
        self.encoding, self._make = encoding, make_hf
        self.vocab_size: int = encoding.n_vocab
        self.eos_token, self.eos_id = EOS, encoding.eot_token

    @property
    def vocab(self) -> dict[str, int]:
        names, tokens = _names(), enumerate(self._tokens())
        return {"".join(names[byte] for byte in token): i for i, token in tokens} | {EOS: self.encoding.eot_token}

    @property
    def special_tokens(self) -> list[str]:
        return [EOS]

    @property
    def fingerprint(self) -> str:
        return _FINGERPRINT

    def _make_hf(self) -> Any:
        if self._make is not None:
            return self._make()
        from transformers import GPT2Tokenizer

        # Given `vocab_file=` and `merges_file=`, it would silently become a tokenizer of one token.
        merges: Any = _merges(self._tokens())
        return GPT2Tokenizer(vocab=self.vocab, merges=merges)

    def _tokens(self) -> list[bytes]:
        return [self.encoding.decode_single_token_bytes(i) for i in range(self.encoding.eot_token)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if all(len(text) < _LONG for text in texts):
            return self.encoding.encode_ordinary_batch(texts)
        return [[i for part in _parts(text) for i in self.encoding.encode_ordinary(part)] for text in texts]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        ordinary = [[i for i in row if i < self.encoding.eot_token] for row in rows]
        return [self.encoding.decode_bytes(row).decode("utf-8", errors="replace") for row in ordinary]


def _parts(text: str) -> list[str]:
    """Cut a text before the last character of each long run of white space, where the pattern ends a token anyway."""
    cuts = [found.end() - 1 for found in _SPACES.finditer(text) if found.end() < len(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _downloaded() -> Any:
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split()).partition(" (Caused by")[0]
        raise ConfigError(
            f"GPT-2's vocabulary is not in tiktoken's cache, and could not be downloaded ({why}). Ways on: "
            f"model.tokenizer.path=/dir with vocab.bpe and encoder.json, or vocab.json and merges.txt; model.path="
            f"/dir with a model and its tokenizer; TIKTOKEN_CACHE_DIR=/dir, filled where there is a network by python "
            f"""-c "import tiktoken; tiktoken.get_encoding('gpt2')"; or model=tiny, which ships with its own"""
        ) from error


def _published(path: str) -> Tiktoken:
    """Return GPT-2's tokenizer from the published files in a directory."""
    found = resolve(path)
    if isinstance(found, str) or not found.is_dir():
        raise ConfigError(f"model.tokenizer.path={path} is no directory; leave it out to let tiktoken get the files")
    tokens = _tokens(found)
    if tokens is None or _digest(tokens) != _TOKENS_SHA256:
        raise ConfigError(
            f"model.tokenizer.path={path} holds no files of GPT-2's tokenizer as published: they are vocab.bpe and "
            f"encoder.json, or vocab.json and merges.txt. Another tokenizer: model/tokenizer=huggingface "
            f"model.tokenizer.path={path}"
        )
    return Tiktoken(_encoding(tokens))


def _tokens(directory: Path) -> list[bytes] | None:
    """Return the tokens of GPT-2's kind of BPE in the order of their ids, without the last, "<|endoftext|>".

    None if the directory holds no tokenizer of this kind and size.
    """
    file = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if file is None or (directory / "added_tokens.json").exists():
        return None
    bytes_of = {name: byte for byte, name in enumerate(_names())}
    try:
        config = directory / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        if settings.get("add_prefix_space") or settings.get("eos_token", EOS) != EOS:
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "tokenizer.json":
            _check_gpt2(content)
            vocab, merges = {**content["model"]["vocab"], EOS: VOCAB_SIZE - 1}, content["model"]["merges"]
        else:
            lines = (directory / _MERGES[file.name]).read_text(encoding="utf-8").split("\n")
            vocab, merges = content, [line for line in lines[1:] if line]  # the first line is "#version: 0.2"
        names = sorted(vocab, key=vocab.__getitem__)
        joined = ["".join(merge).replace(" ", "") for merge in merges]
        if names[-1] != EOS or joined != names[256:-1] or sorted(vocab.values()) != list(range(VOCAB_SIZE)):
            return None
        return [bytes(bytes_of[character] for character in name) for name in names[:-1]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _check_gpt2(backend: dict[str, Any]) -> None:
    """Raise `ValueError` if a tokenizer.json splits texts in another way than GPT-2, or has other added tokens."""
    before, model, added = backend["pre_tokenizer"], backend["model"], backend["added_tokens"]
    is_gpt2 = (
        backend.get("normalizer") is None
        and (before["type"], before["add_prefix_space"], before.get("use_regex", True)) == ("ByteLevel", False, True)
        and model.get("type", "BPE") == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and [(token["content"], token["id"]) for token in added] == [(EOS, VOCAB_SIZE - 1)]
    )
    if not is_gpt2:
        raise ValueError


def _encoding(tokens: list[bytes]) -> Any:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks, special = {token: i for i, token in enumerate(tokens)}, {EOS: VOCAB_SIZE - 1}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def _digest(tokens: list[bytes]) -> str:
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(len(token).to_bytes(2, "little") + token)
    return digest.hexdigest()


def _names() -> list[str]:
    """Return the character that stands for each byte in a vocabulary's file: the byte's own, if it can be printed."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = {byte: chr(256 + n) for n, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    return [others.get(byte, chr(byte)) for byte in range(256)]


def _merges(tokens: list[bytes]) -> list[tuple[str, str]]:
    """Return the merge rule (pair of parts) that made each token, in the order of the tokens.

    Encoding the token with the rules before its own leaves two parts: these are the pair.
    """
    ranks, names, merges = {token: i for i, token in enumerate(tokens)}, _names(), []
    for rank, token in enumerate(tokens[256:], 256):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        left, right = ("".join(names[byte] for byte in part) for part in parts)
        merges.append((left, right))
    return merges
