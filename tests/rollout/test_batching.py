from __future__ import annotations

import pytest

from rlft.rollout.batching import WaitingQueue


def taken(queue: WaitingQueue, num_running: int) -> list[list[int]]:
    return [list(unit) for unit in queue.take(num_running)]


def test_groups_begin_together_where_they_fit() -> None:
    queue = WaitingQueue(4, group_size=2, max_rows=5)
    assert taken(queue, 0) == [[0, 1], [2, 3]]
    assert queue.num_wanted == 2
    assert taken(queue, 4) == []
    assert taken(queue, 3) == [[4, 5]]
    assert taken(queue, 0) == [[6, 7]]
    assert not queue.units and queue.num_wanted == 0


def test_a_group_larger_than_the_batch_is_split() -> None:
    queue = WaitingQueue(2, group_size=5, max_rows=3)
    assert [taken(queue, 0) for _ in range(4)] == [[[0, 1, 2]], [[3, 4]], [[5, 6, 7]], [[8, 9]]]


@pytest.mark.parametrize("max_rows", [None, 6, 100])
def test_all_rows_begin_at_once_where_that_is_allowed(max_rows: int | None) -> None:
    queue = WaitingQueue(3, group_size=2, max_rows=max_rows)
    assert taken(queue, 0) == [[0, 1], [2, 3], [4, 5]]
