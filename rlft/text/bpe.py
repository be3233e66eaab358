"""A byte-level BPE trained on a corpus (Sennrich et al., "Neural machine translation of rare words with subword
units", 2016; over bytes as in GPT-2, Radford et al. 2019, with GPT-2's splitting pattern).

Training is by the `tokenizers` library. Every text can be encoded, because the 256 bytes are in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlft.core.cache_dir import atomic_path, cache_dir, digest, key_of, texts_digest
from rlft.core.errors import ConfigError
from rlft.core.ranges import Size
from rlft.text.backend import BackendTokenizer, with_post_processor
from rlft.text.tokenizer import Texts, Tokenizer, check_text

EOS = "<|endoftext|>"
BYTES = 256


def trained_bpe(*, source: Texts, vocab_size: Size) -> Tokenizer:
    """Return a byte-level BPE trained on the train split of `source`.

    The same texts and size give the same tokenizer, bit for bit. It is kept in the cache directory, so that only the
    first call trains, and reads the texts where the source has a key (`rlft.core.cache_dir.Keyed`).

    Arguments:
        source: has `rows("train")`, whose items have `text` and `where`.
        vocab_size: ids in all: 256 bytes, the merges, and "<|endoftext|>" as the last id, as in GPT-2.

    Raises `ConfigError` if `vocab_size` is below 257 or above what the texts can give; `DataError` for a
    text that is not Unicode.
    """
    if vocab_size < BYTES + 1:
        raise ConfigError(
            f"vocab_size={vocab_size}: a byte-level BPE needs at least {BYTES + 1} ids (256 bytes and {EOS}); "
            f"2000 to 8000 suit a small model"
        )
    path = cache_dir() / "tokenizers" / f"bpe-{vocab_size}-{_key(source, vocab_size)}.json"
    if not path.exists():
        rows = source.rows("train")
        backend = _train((_checked(row) for row in rows), len(rows), vocab_size)
        with atomic_path(path) as temporary:
            backend.save(str(temporary))
    # Read back even when just trained, so that the first run and the later ones hold the same object.
    return BackendTokenizer(with_post_processor(_load(path)), eos_token=EOS)


def _train(texts: Iterable[str], num_texts: int, vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size() + 1
    if reached < vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: the {num_texts} training texts give no more than {reached} tokens; "
            f"set vocab_size={reached} or less, or give more text"
        )
    backend.add_special_tokens([EOS])
    return backend


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} is damaged ({error}); delete it, and it is trained again") from error


def _key(source: Any, vocab_size: int) -> str:
    """Return the name of what the tokenizer depends on: the source's key, or a hash of all its training texts."""
    texts = key_of(source)
    if texts is None:
        rows = source.rows("train")
        texts = texts_digest((_checked(row) for row in rows), len(rows))
    return digest(vocab_size=vocab_size, eos=EOS, tokenizers=tokenizers.__version__, texts=texts)


def _checked(row: Any) -> str:
    check_text(row.text, row.where)
    return row.text
