"""Plain text for language-model training: one long array of tokens, cut into blocks.

nanoGPT and the GPT papers pack text in the same way, but nanoGPT draws the starts of blocks at random with replacement.
Here an epoch is a permutation of blocks that do not overlap, so each token is trained on once an epoch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rlft.core.cache_dir import atomic_path, cache_dir, digest, key_of_texts
from rlft.core.errors import ConfigError, DataError
from rlft.core.ranges import Size
from rlft.core.rng import generator, order
from rlft.data.encode import Encoder, encode_texts, in_chunks, tokenizer_key
from rlft.data.kinds import Kind
from rlft.data.source import Source, check_split, holds_out
from rlft.data.store import VERSION, Column


class TextData:
    """Blocks of `block_size + 1` tokens; a block's inputs are `block[:-1]` and its targets `block[1:]`.

    The texts of a split are joined in the source's order, each followed by the end-of-text token if the tokenizer has
    one. Consecutive blocks overlap by one token, so that each token but the first is a target once. The tail, which
    does not fill a block, is left out; `counts` holds its length. Each epoch of the training split begins its first
    block at another offset, drawn from (seed, epoch), and reads the array as a ring: blocks and tail differ by epoch.

    Args:
        source: where the texts come from.
        tokenizer: turns them into ids, which are kept in the cache directory.
        block_size: inputs of a block, in tokens, at least 1.
    """

    kind = Kind.TEXT

    def __init__(self, source: Source, *, tokenizer: Encoder, block_size: Size) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size is a number of tokens, at least 1, got {block_size}")
        self.source, self.tokenizer, self.block_size = source, tokenizer, block_size
        self._tokens: dict[str, np.ndarray] = {}

    def tokens(self, split: str) -> np.ndarray:
        """Return the tokens of a split, int32 `[T]`, made at the first call and then read from the cache."""
        if check_split(split) not in self._tokens:
            self._tokens[split] = self._load(split)
        return self._tokens[split]

    def num_blocks(self, split: str) -> int:
        """Return the number of whole blocks in the split (for train: in an epoch)."""
        return max(0, (len(self.tokens(split)) - 1) // self.block_size)

    def batch(self, step: int, *, size: int, seed: int) -> torch.Tensor:
        """Return the training batch of a step, int64 `[size, block_size + 1]`: a function of its arguments only."""
        num_blocks = self._some_blocks("train")
        first = step * size
        picked = order(num_blocks, seed=seed, start=first, count=size)
        epochs = np.arange(first, first + size) // num_blocks
        offset = {int(e): int(generator(seed, "block offset", int(e)).integers(self.block_size)) for e in set(epochs)}
        starts = picked * self.block_size + np.array([offset[int(e)] for e in epochs])  # [size]
        return self._blocks("train", starts)

    def validation(self, *, max_blocks: int | None = None) -> torch.Tensor:
        """Return the first `max_blocks` blocks of the validation split (None: all), int64 `[N, block_size + 1]`."""
        if max_blocks is not None and max_blocks < 1:
            raise ConfigError(f"max_blocks is at least 1, or null for all of them, got {max_blocks}")
        num_blocks = self._some_blocks("validation")
        count = num_blocks if max_blocks is None else min(max_blocks, num_blocks)
        return self._blocks("validation", np.arange(count) * self.block_size)

    @property
    def counts(self) -> dict[str, int]:
        """The source's counts, and for train and validation the tokens, the blocks and the tokens of the tail."""
        counts = dict(self.source.counts)
        for split in ("train", "validation"):
            tokens, blocks = len(self.tokens(split)), self.num_blocks(split)
            counts[f"{split}_tokens"], counts[f"{split}_blocks"] = tokens, blocks
            counts[f"{split}_tail_tokens"] = tokens - (blocks * self.block_size + 1) if blocks else tokens
        return counts

    @property
    def holds_out(self) -> bool:
        """Whether the source was asked for a validation split."""
        return holds_out(self.source)

    def _blocks(self, split: str, starts: np.ndarray) -> torch.Tensor:
        tokens = self.tokens(split)
        index = (starts[:, None] + np.arange(self.block_size + 1)) % len(tokens)  # [N, block_size + 1]
        return torch.from_numpy(tokens[index].astype(np.int64))

    def _some_blocks(self, split: str) -> int:
        num_blocks = self.num_blocks(split)
        if num_blocks == 0:
            without = ", or data.source.validation=0 to train without evaluation" if split == "validation" else ""
            raise DataError(
                f"the {split} split has {len(self.tokens(split))} tokens, fewer than one block of "
                f"{self.block_size} + 1: give more text, a larger share to this split, or a smaller block_size{without}"
            )
        return num_blocks

    def _load(self, split: str) -> np.ndarray:
        source = key_of_texts(self.source, split)
        key = digest(version=VERSION, source=source, split=split, **tokenizer_key(self.tokenizer))
        path = cache_dir() / "tokens" / f"{key}.npy"
        if not path.is_file():
            with atomic_path(path) as temporary:
                self._write(temporary, split)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): delete it, and it is made again") from error

    def _write(self, path: Path, split: str) -> None:
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        tokens = Column(path, "int32")
        for _, rows in in_chunks(self.source.rows(split), "tokenising text"):
            texts, places = [row.text for row in rows], [row.where for row in rows]
            for ids in encode_texts(texts, places, tokenizer=self.tokenizer):
                tokens.extend(ids)
                tokens.extend(end)
        tokens.finish()
