"""Tokenizers of the library `tokenizers`, on which the fast tokenizers of `transformers` are built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import processors

from rlft.core.errors import ConfigError, DataError
from rlft.text.tokenizer import Tokenizer


class BackendTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers` behind our interface.

    Arguments:
        backend: the tokenizer.
        eos_token: the end-of-text token, which is in the backend's vocabulary; None if there is none.
        make_hf: makes the `transformers` tokenizer with the same ids; None: a generic one around the backend.
        name: the tokenizer's name in error messages.

    Raises `ConfigError` if the backend has an empty vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str | None,
        make_hf: Callable[[], Any] | None = None,
        name: str = "this tokenizer",
    ) -> None:
        self.backend, self._make = backend, make_hf
        vocab = self.vocab
        if not vocab.keys() - set(self.special_tokens):
            raise ConfigError(
                f"{name} has an empty vocabulary: its tokenizer.json is missing, or its vocabulary was given under a "
                f"name that this transformers does not know"
            )
        self.vocab_size = max(vocab.values()) + 1  # larger than the number of tokens if some ids are unused
        self.eos_token = eos_token
        self.eos_id = None if eos_token is None else vocab[eos_token]

    @classmethod
    def of(cls, hf: Any) -> BackendTokenizer:
        """Wrap a `transformers` tokenizer. Raises `ConfigError` if it has no backend of `tokenizers`."""
        name = f"{type(hf).__name__} ({hf.name_or_path})"
        if not hf.is_fast:
            raise ConfigError(
                f"{name} has no fast version, which is needed; give a tokenizer that has a tokenizer.json"
            )
        return cls(hf.backend_tokenizer, eos_token=hf.eos_token, make_hf=lambda: hf, name=name)

    @property
    def vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the backend's JSON."""
        backend = json.loads(self.backend.to_str())
        for setting in ("truncation", "padding"):  # set by the last call of `hf`; `encode` resets them
            del backend[setting]
        return hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()

    def _make_hf(self) -> Any:
        if self._make is not None:
            return self._make()
        from transformers import PreTrainedTokenizerFast

        eos = self.eos_token
        return PreTrainedTokenizerFast(tokenizer_object=self.backend, bos_token=eos, eos_token=eos)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # `hf` may share this backend, and a call of it changes these settings.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # encode their text as ordinary text
        try:
            return [row.ids for row in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises plain Exception, for example for an unknown character
            raise DataError(f"the tokenizer cannot encode {texts[0][:40]!r} or a text after it: {error}") from error

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.backend.decode_batch(rows, skip_special_tokens=True)


def with_post_processor(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Give a backend without a post-processor the one that `transformers` would give it, which adds no tokens.

    A tokenizer then has the same fingerprint whether it was built here or loaded from a file.
    """
    if backend.post_processor is None:
        backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return backend
