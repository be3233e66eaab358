"""A byte-level BPE trained on a corpus (Sennrich et al., "Neural machine translation of rare words with subword
units", 2016; over bytes as in GPT-2, Radford et al. 2019, with GPT-2's splitting pattern).

The library `tokenizers` trains it. Every text can be encoded, because the 256 bytes are in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlft.core.cache_dir import atomic_path, cache_dir, digest, key_of_texts
from rlft.core.errors import ConfigError
from rlft.core.ranges import Size
from rlft.text.backend import BackendTokenizer, with_post_processor
from rlft.text.tokenizer import Texts, Tokenizer, check_text

EOS = "<|endoftext|>"
BYTES = 256


def trained_bpe(*, source: Texts, vocab_size: Size) -> Tokenizer:
    """Return a byte-level BPE trained on the train split of `source`.

    The same texts and size give the same tokenizer, bit for bit. It is cached on disk, so only the first call trains;
    later calls do not even read the texts if the source has a key (`rlft.core.cache_dir.Keyed`).

    Arguments:
        source: has `rows("train")`, whose items have `text` and `where`.
        vocab_size: the number of ids: 256 bytes, the merges, and "<|endoftext|>" as the last id, as in GPT-2.

    Raises `ConfigError` if `vocab_size` is below 257 or larger than the texts allow; `DataError` for a text that is not
    valid Unicode.
    """
    if vocab_size < BYTES + 1:
        raise ConfigError(
            f"vocab_size={vocab_size}: a byte-level BPE needs at least {BYTES + 1} ids (256 bytes and {EOS}); "
            f"2000 to 8000 suit a small model"
        )
    texts = key_of_texts(source, "train")
    key = digest(vocab_size=vocab_size, eos=EOS, tokenizers=tokenizers.__version__, texts=texts)
    path = cache_dir() / "tokenizers" / f"bpe-{vocab_size}-{key}.json"
    if not path.exists():
        rows = source.rows("train")
        backend = _train((_checked(row) for row in rows), len(rows), vocab_size)
        with atomic_path(path) as temporary:
            backend.save(str(temporary))
    # It is read back even when it was just trained, so that the first run uses the same tokenizer as later runs.
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
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path} is damaged ({error}); delete it, and it is trained again") from error


def _checked(row: Any) -> str:
    check_text(row.text, row.where)
    return row.text
