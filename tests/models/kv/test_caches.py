from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlft.models.kv.base import CacheShape
from rlft.models.kv.copied import DecodeCache
from rlft.models.kv.prefix import PrefixCache
from tests.models.tiny import tiny

SHAPE = CacheShape(num_layers=2, num_kv_heads=3, head_dim=4)
LENGTHS = torch.tensor([2, 5])
OF_ROW = torch.tensor([0, 1, 1, 0])


def numbers(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prefix(lengths: Tensor = LENGTHS) -> PrefixCache:
    """Two prompts in five slots."""
    cache = PrefixCache(lengths)
    assert cache.mask(5) is None
    for layer in range(SHAPE.num_layers):
        keys, values = numbers(layer, 2, 3, 5, 4), numbers(10 + layer, 2, 3, 5, 4)
        got = cache.extend(layer, keys, values)
        assert got[0] is keys and got[1] is values
    return cache


def decode(lengths: Tensor = LENGTHS) -> DecodeCache:
    return DecodeCache(prefix(lengths), OF_ROW, max_new_tokens=6, shape=SHAPE)


def feed(cache: DecodeCache, step: int, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Extend every layer by one token of the given rows, the same token whatever else is in the cache."""
    new = [
        (numbers(100 * step + layer, 4, 3, 1, 4)[rows], numbers(100 * step + 50 + layer, 4, 3, 1, 4)[rows])
        for layer in range(SHAPE.num_layers)
    ]
    return [cache.extend(layer, *pair) for layer, pair in enumerate(new)]


def test_memory_is_as_the_docstring_says() -> None:
    cache = decode()
    layers, rows, heads, slots, new, width = 2, 4, 3, 5, 6, 4
    assert sum(t.numel() for t in cache.keys + cache.values) == 2 * layers * rows * heads * (slots + new) * width
    assert {t.dtype for t in cache.keys + cache.values} == {torch.float64}


def test_decoding_writes_in_place_and_never_grows() -> None:
    cache = decode()
    addresses = [t.data_ptr() for t in cache.keys + cache.values]
    for step in range(6):
        for layer, (keys, values) in enumerate(feed(cache, step, torch.arange(4))):
            assert keys.shape == values.shape == (4, 3, 6 + step, 4)
            torch.testing.assert_close(keys[:, :, :5], prefix().keys[layer][OF_ROW], rtol=0, atol=0)
            torch.testing.assert_close(values[:, :, :5], prefix().values[layer][OF_ROW], rtol=0, atol=0)
            assert torch.equal(keys[:, :, 5 + step :], numbers(100 * step + layer, 4, 3, 1, 4))
            assert torch.equal(values[:, :, 5 + step :], numbers(100 * step + 50 + layer, 4, 3, 1, 4))
    assert [t.data_ptr() for t in cache.keys + cache.values] == addresses


def test_the_mask_hides_the_gap_after_a_short_prompt() -> None:
    cache = decode()
    short, long = [True, True, False, False, False], [True] * 5
    for step in range(3):
        expected = [prompt + [True] * (step + 1) for prompt in (short, long, long, short)]
        assert cache.mask(1)[:, 0, 0].tolist() == expected
        feed(cache, step, torch.arange(4))


def test_prompts_of_one_length_need_no_mask() -> None:
    assert decode(torch.tensor([5, 5])).mask(1) is None


def test_decoding_takes_one_token_at_a_time() -> None:
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        decode().mask(2)


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([5, 5])], ids=["gap", "no gap"])
def test_compaction_keeps_the_rows_and_drops_the_others(lengths: Tensor) -> None:
    whole, compacted = decode(lengths), decode(lengths)
    everyone, rows = torch.arange(4), torch.tensor([1, 3])
    for cache in (whole, compacted):
        feed(cache, 0, everyone)
    compacted.compact(rows)
    assert {t.shape for t in compacted.keys + compacted.values} == {(2, 3, 11, 4)}
    for step in (1, 2):
        if lengths is LENGTHS:
            assert torch.equal(compacted.mask(1), whole.mask(1)[rows])
        else:
            assert compacted.mask(1) is None
        for (k, v), (all_k, all_v) in zip(feed(compacted, step, rows), feed(whole, step, everyone), strict=True):
            assert torch.equal(k, all_k[rows]) and torch.equal(v, all_v[rows])
    compacted.compact(torch.tensor([1]))  # the second of those that are left
    assert torch.equal(compacted.keys[0][:, :, :8], whole.keys[0][3:, :, :8])


def test_the_mask_of_an_expanded_prefix() -> None:
    expanded = prefix().expand(torch.tensor([1, 0]))
    short, long = [True, True, False, False, False], [True] * 5
    causal = [[True, False, False], [True, True, False], [True, True, True]]
    assert expanded.mask(3)[:, 0].tolist() == [[long + row for row in causal], [short + row for row in causal]]


def test_an_expanded_prefix_gives_each_row_its_prompt_and_sums_their_gradients() -> None:
    cache = prefix()
    leaf = cache.keys[1].requires_grad_()
    new = numbers(7, 4, 3, 2, 4)
    keys, values = cache.expand(OF_ROW).extend(1, new, new)
    for row, prompt in enumerate(OF_ROW.tolist()):
        assert torch.equal(keys[row], torch.cat([cache.keys[1][prompt], new[row]], dim=1))
        assert torch.equal(values[row], torch.cat([cache.values[1][prompt], new[row]], dim=1))
    weights = numbers(8, 4, 3, 7, 4)
    (keys * weights).sum().backward()
    expected = torch.stack([weights[0] + weights[3], weights[1] + weights[2]])[:, :, :5]
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-14)


@torch.no_grad()
def test_cached_forwards_equal_one_plain_forward() -> None:
    policy = tiny()
    ids = torch.randint(0, 19, (2, 11), generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([5, 5])
    plain = policy(ids)
    cache = PrefixCache(starts)
    torch.testing.assert_close(policy(ids[:, :5], cache=cache), plain[:, :5], rtol=0, atol=1e-12)
    rest = policy(ids[:, 5:], positions=torch.arange(5, 11)[None], cache=cache.expand(torch.arange(2)))
    torch.testing.assert_close(rest, plain[:, 5:], rtol=0, atol=1e-12)
    decoding = DecodeCache(cache, torch.arange(2), max_new_tokens=6, shape=policy.cache_shape)
    for t in range(5, 11):
        hidden = policy(ids[:, t : t + 1], positions=torch.tensor([[t]]), cache=decoding)
        torch.testing.assert_close(hidden[:, 0], plain[:, t], rtol=0, atol=1e-12)
