from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest

from rlft.core import rng
from rlft.core.rng import generator, order, random_rows

WORD = 2**64


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in its paper (Salmon et al., SC 2011, section 3.3): four words from a counter and a key."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], WORD)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], WORD)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) % WORD, (k[1] + 0xBB67AE8584CAA73B) % WORD]
    return x


def test_the_oracle_gives_the_published_vector() -> None:
    # from Random123's kat_vectors: philox4x64 10, all zero
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox([0, 0, 0, 0], [0, 0]) == expected


@pytest.mark.parametrize(
    ("seed", "stream", "counts"),
    [(0, "order", (0, 0, 0)), (1, "rollout", (2, 3, 4)), (2**63 + 5, "init/wte.weight", (7, 10**6, 2**40))],
)
def test_a_draw_is_philox_at_the_key_and_the_counts(seed: int, stream: str, counts: tuple[int, int, int]) -> None:
    """NumPy adds one to the counter before each block of four; a double is the upper 53 bits of a word."""
    words = [w for block in range(1, 4) for w in philox([block, *counts], [seed, zlib.crc32(stream.encode())])]
    expected = np.array([w >> 11 for w in words], dtype=np.float64) * 2.0**-53
    np.testing.assert_array_equal(generator(seed, stream, *counts).random(12), expected)


def test_rows_of_draws_are_those_of_a_generator_each() -> None:
    counts = [(2, 3, 4), (0, 0, 0), (2, 3, 4), (1, 10**6, 2**40)]
    expected = np.stack([generator(7, "rollout", *count).random(9) for count in counts])  # in blocks of four
    np.testing.assert_array_equal(random_rows(7, "rollout", counts, size=9), expected)


def test_nothing_is_kept_between_draws() -> None:
    first = generator(3, "rollout", 1, 2, 3)
    expected = first.random(50)
    np.random.seed(0)
    generator(3, "rollout", 1, 2, 3).random(7)
    generator(4, "rollout").random(7)
    again = generator(3, "rollout", 1, 2, 3)
    np.testing.assert_array_equal(np.concatenate([again.random(20), again.random(30)]), expected)


def test_neighbouring_counts_seeds_and_streams_never_meet() -> None:
    seen: set[int] = set()
    keys = list(itertools.product((0, 1), ("a", "b"), range(4), range(4), range(4)))
    for key in keys:
        seen.update(generator(*key).integers(0, WORD - 1, 64, dtype=np.uint64, endpoint=True).tolist())
    assert len(seen) == 64 * len(keys)


def test_negative_counts_and_seeds_are_refused() -> None:
    for arguments in [(-1, "order"), (0, "order", -1)]:
        with pytest.raises(OverflowError):
            generator(*arguments)


@pytest.mark.parametrize("num_items", [1, 2, 7, 64])
def test_each_epoch_is_a_permutation(num_items: int) -> None:
    epochs = order(num_items, seed=1, start=0, count=3 * num_items).reshape(3, num_items)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(num_items))
    if num_items == 64:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
        assert epochs[0].tolist() != order(64, seed=2, start=0, count=64).tolist()
        assert epochs[0].tolist() != list(range(64))


@pytest.mark.parametrize("size", [1, 3, 7, 16, 50])
def test_a_batch_depends_on_its_place_only(size: int) -> None:
    """Some batches are larger than an epoch, and some cross from one epoch to the next."""
    whole = order(7, seed=5, start=0, count=100)
    assert whole.dtype == np.int64
    for start in range(0, 100 - size, size):
        np.testing.assert_array_equal(order(7, seed=5, start=start, count=size), whole[start : start + size])


def test_an_order_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_items must be at least 1, got 0"):
        order(0, seed=1, start=0, count=1)
    assert order(5, seed=1, start=3, count=0).shape == (0,)


def test_an_epochs_permutation_is_drawn_once_and_cannot_be_changed(monkeypatch) -> None:
    rng._epoch.cache_clear()
    draws = []
    monkeypatch.setattr(rng, "generator", lambda *key: draws.append(key) or generator(*key))
    steps = [order(1000, seed=3, start=8 * step, count=8) for step in range(125)]
    assert len(draws) == 1
    assert np.concatenate(steps).tolist() == generator(3, "order", 0).permutation(1000).tolist()
    steps[0][:] = 0
    assert order(1000, seed=3, start=0, count=8).tolist() == generator(3, "order", 0).permutation(1000)[:8].tolist()
