"""One id for each character, as in nanoGPT's `data/shakespeare_char/prepare.py`, and one for the end of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from rlft.core.cache_dir import atomic_path, cache_dir, digest, key_of
from rlft.core.errors import ConfigError, DataError
from rlft.text.backend import BackendTokenizer, with_post_processor
from rlft.text.tokenizer import Texts, check_text

EOS = "<|endoftext|>"


def characters(*, alphabet: str | None = None, source: Texts | None = None) -> CharacterTokenizer:
    """Return a tokenizer with one id for each character.

    Ids are in the order of the characters' code points, whatever the order of `alphabet` or of the texts. The last id
    is "<|endoftext|>", which no text encodes to.

    Arguments:
        alphabet: the characters; give this or `source`.
        source: the alphabet is every character of the texts of `source.rows("train")`. A character that occurs only in
            another split cannot be encoded.

    Raises `ConfigError` if both or neither are given, the alphabet is empty, or a character is in it twice.
    """
    if (alphabet is None) == (source is None):
        given = "neither" if alphabet is None else "both"
        raise ConfigError(f"characters needs either alphabet or source, got {given}")
    if alphabet is None:
        assert source is not None
        alphabet = _alphabet(source)
    check_text(alphabet, "the alphabet")
    ordered = sorted(set(alphabet))
    if not ordered:
        raise ConfigError("the alphabet is empty: give alphabet, or a source with text in its train split")
    if len(ordered) != len(alphabet):
        repeated = sorted(c for c in ordered if alphabet.count(c) > 1)
        raise ConfigError(f"alphabet={alphabet!r} holds {', '.join(map(repr, repeated))} more than once; write it once")
    return CharacterTokenizer(_build(ordered), "".join(ordered))


def _alphabet(source: Texts) -> str:
    """Return every character of the training texts; cached on disk if the source has a key."""
    key = key_of(source)
    path = None if key is None else cache_dir() / "tokenizers" / f"alphabet-{digest(texts=key)}.json"
    if path is not None and path.is_file():
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it, and it is made again") from error
    found: set[str] = set()
    for row in source.rows("train"):
        found.update(row.text)
    alphabet = "".join(sorted(found))
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(alphabet))
    return alphabet


def _build(ordered: list[str]) -> tokenizers.Tokenizer:
    # Without an unknown token, the backend raises for an unknown character, also where `transformers` loads it.
    backend = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(ordered)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOS])
    return with_post_processor(backend)


class CharacterTokenizer(BackendTokenizer):
    """A tokenizer that refuses characters outside its alphabet, and names them, instead of replacing them."""

    def __init__(self, backend: tokenizers.Tokenizer, alphabet: str) -> None:
        super().__init__(backend, eos_token=EOS)
        self.alphabet = alphabet
        vocab = self.vocab
        self._ids = {character: vocab[character] for character in alphabet}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; raises `DataError` that names the characters outside the alphabet."""
        rows = []
        for index, text in enumerate(texts):
            try:  # the backend gives the same ids a hundred times more slowly
                rows.append([self._ids[character] for character in text])
            except KeyError:
                raise self._unknown(text, index) from None
        return rows

    def _unknown(self, text: str, index: int) -> DataError:
        unknown = sorted(set(text) - self._ids.keys())
        named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        return DataError(
            f"text {index}: unknown characters {named}{more}; the alphabet has {len(self.alphabet)} characters, "
            f"{self.alphabet[:100]!r}; add the missing ones to the tokenizer's alphabet, or clean the text"
        )
