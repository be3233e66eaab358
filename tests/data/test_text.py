from __future__ import annotations

import numpy as np
import pytest
import torch

from rlft.core.errors import ConfigError, DataError
from rlft.data.text import TextData

EOS = 256  # of the byte tokenizer


def packed(source, split, eos=(EOS,)):
    """The oracle: all texts of a split, each followed by the end-of-text token."""
    return [i for row in source.rows(split) for i in [*row.text.encode(), *eos]]


@pytest.fixture
def source(invented, make_source):
    return make_source(invented)


def test_tokens_are_the_texts_each_followed_by_end_of_text(source, tokenizer):
    tokens = TextData(source, tokenizer=tokenizer, block_size=16).tokens("train")
    assert tokens.dtype == np.int32
    assert tokens.tolist() == packed(source, "train")


def test_without_end_of_text_the_texts_are_joined_by_nothing(source, make_tokenizer):
    data = TextData(source, tokenizer=make_tokenizer(eos_id=None), block_size=16)
    assert data.tokens("train").tolist() == packed(source, "train", eos=())


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_validation_blocks_keep_every_token_but_the_counted_tail(source, tokenizer, block_size):
    data = TextData(source, tokenizer=tokenizer, block_size=block_size)
    blocks = data.validation(max_blocks=None)
    assert blocks.dtype == torch.int64 and blocks.shape == (data.num_blocks("validation"), block_size + 1)
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1])
    joined = blocks[0, :1].tolist() + blocks[:, 1:].flatten().tolist()
    whole, tail = packed(source, "validation"), data.counts["validation_tail_tokens"]
    assert joined == whole[: len(whole) - tail]
    assert 0 <= tail < block_size


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_an_epoch_trains_on_every_target_once_but_the_counted_tail(source, tokenizer, block_size):
    data = TextData(source, tokenizer=tokenizer, block_size=block_size)
    tokens = np.arange(len(data.tokens("train")))
    data._tokens["train"] = tokens  # each token is its own position
    for epoch in (0, 1):
        blocks = data.batch(epoch, size=data.num_blocks("train"), seed=5)
        targets = blocks[:, 1:].flatten().tolist()
        assert len(set(targets)) == len(targets) == len(tokens) - 1 - data.counts["train_tail_tokens"]
        assert torch.equal((blocks[:, :-1] + 1) % len(tokens), blocks[:, 1:])


def test_blocks_start_elsewhere_in_another_epoch_and_with_another_seed(source, tokenizer):
    data = TextData(source, tokenizer=tokenizer, block_size=64)
    data._tokens["train"] = np.arange(len(data.tokens("train")))
    num_blocks = data.num_blocks("train")
    cuts = {tuple(sorted(data.batch(e, size=num_blocks, seed=s)[:, 0].tolist())) for s in (0, 1) for e in (0, 1)}
    assert len(cuts) == 4


def test_batch_is_a_function_of_its_arguments_only(source, tokenizer):
    data = TextData(source, tokenizer=tokenizer, block_size=16)
    forwards = [data.batch(step, size=8, seed=3) for step in range(60)]  # more than three epochs
    other = TextData(source, tokenizer=tokenizer, block_size=16)
    for step in (59, 0, 31):
        assert torch.equal(other.batch(step, size=8, seed=3), forwards[step])
    merged = torch.cat(forwards[10:12])
    assert torch.equal(other.batch(5, size=16, seed=3), merged)
    assert not torch.equal(other.batch(0, size=8, seed=4), forwards[0])


def test_validation_is_fixed_and_its_first_blocks_do_not_depend_on_how_many_are_asked_for(source, tokenizer):
    data = TextData(source, tokenizer=tokenizer, block_size=16)
    data.batch(7, size=4, seed=1)
    three = data.validation(max_blocks=3)
    assert three.shape == (3, 17)
    assert torch.equal(three, TextData(source, tokenizer=tokenizer, block_size=16).validation(max_blocks=None)[:3])


def test_second_reader_takes_the_tokens_from_the_cache(source, tokenizer, own_cache, make_tokenizer):
    first = TextData(source, tokenizer=tokenizer, block_size=16).tokens("train")
    assert [path.suffix for path in (own_cache / "tokens").iterdir()] == [".npy"]
    other = make_tokenizer()
    again = TextData(source, tokenizer=other, block_size=16).tokens("train")
    assert not other.calls
    assert np.array_equal(first, again)


def test_cache_is_of_these_texts_and_this_tokenizer(make_source, make_tokenizer):
    def tokens(texts, eos_id):
        source = make_source(texts, validation=0, test=0)
        source.splits["train"].sort(key=lambda row: row.text)
        return TextData(source, tokenizer=make_tokenizer(eos_id), block_size=1).tokens("train").tolist()

    assert tokens(["ab", "c"], EOS) == [*b"ab", EOS, *b"c", EOS]
    assert tokens(["a", "bc"], EOS) == [*b"a", EOS, *b"bc", EOS]
    assert tokens(["a", "bc"], None) == list(b"abc")


def test_damaged_cache_is_refused_by_name(source, tokenizer, own_cache):
    TextData(source, tokenizer=tokenizer, block_size=16).tokens("train")
    (path,) = (own_cache / "tokens").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{path.name} is damaged.*delete it"):
        TextData(source, tokenizer=tokenizer, block_size=16).tokens("train")


def test_split_smaller_than_a_block_is_refused(tokenizer, make_source):
    data = TextData(make_source(["abc"], validation=0, test=0), tokenizer=tokenizer, block_size=4)
    with pytest.raises(DataError, match="train split has 4 tokens, fewer than one block of 4"):
        data.batch(0, size=1, seed=0)
    with pytest.raises(DataError, match="validation split has 0 tokens"):
        data.validation(max_blocks=1)
    assert data.counts["train_tail_tokens"] == 4


def test_text_that_the_tokenizer_refuses_is_named_by_its_place(invented, make_tokenizer, make_source):
    source = make_source([*invented, "a \0 b"], validation=0, test=0)
    with pytest.raises(DataError, match="list:101: the tokenizer cannot encode this text"):
        TextData(source, tokenizer=make_tokenizer(), block_size=4).tokens("train")


def test_wrong_sizes_are_refused(source, tokenizer):
    with pytest.raises(ConfigError, match=r"block_size .* got 0"):
        TextData(source, tokenizer=tokenizer, block_size=0)
    with pytest.raises(ConfigError, match=r"max_blocks .* got 0"):
        TextData(source, tokenizer=tokenizer, block_size=4).validation(max_blocks=0)
