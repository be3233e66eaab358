"""Generated problems and the reward that verifies their answers."""

from __future__ import annotations

import pytest

from rlft.core.errors import ConfigError, RewardError
from rlft.data.tasks import Task
from rlft.rewards.answer import Answer


def rows(**settings):
    task = Task(**settings)
    return [row for split in ("train", "validation", "test") for row in task.rows(split)]


def test_sums_are_all_there_once_and_right():
    found = {row.text: row.columns["answer"] for row in rows(kind="sums", size=20)}
    assert found == {f"{a}+{b}=": str(a + b) for a in range(20) for b in range(20)}
    assert len(rows(kind="sums", size=20)) == 400


def test_sorting_keeps_the_letters_and_their_order():
    drawn = rows(kind="sort", size=5, num=300)
    assert len(drawn) > 290
    for row in drawn:
        assert row.text.endswith("=") and list(row.columns["answer"]) == sorted(row.text[:-1])
    assert [row.text for row in rows(kind="sort", size=5, num=300, seed=1)] != [row.text for row in drawn]


def test_splits_share_no_problem():
    task = Task(kind="sums", size=40)
    train, held_out = ({row.text for row in task.rows(split)} for split in ("train", "validation"))
    assert held_out and not train & held_out
    assert Task(kind="recite", size=2).rows("train") == Task(kind="recite", size=2).rows("validation")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sum", "size": 3}, "did you mean 'sums'"),
        ({"kind": "recite", "size": 9}, "between 1 and 4"),
        ({"kind": "sums", "size": 0}, "size=0 must be between"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Task(**settings)


def test_answers_by_hand():
    completions, answer = [" 12", "13", "1", ""], ["12", "12", 12, ""]
    ids = [[0] * 3] * 4
    assert Answer()(completions, ids, answer=answer) == [1, 0, 0, 1]
    assert Answer(mode="fraction")(completions, ids, answer=answer) == [1, 0.5, 0.5, 0]
    values = Answer(mode="characters")(["abx", "b", "b"], [[0] * 4, [0], [0] * 2], answer=["abc", "bd", "bd"])
    assert values == [[0.25, 0.25, 0, 0.25], [1 / 3], [1 / 3, 0]]  # the fourth of "abx" is a correct end token


def test_what_cannot_be_verified_is_refused():
    with pytest.raises(ConfigError, match="column 'answer'"):
        Answer()(["1"], [[0]])
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        Answer(mode="exat")
    with pytest.raises(RewardError, match="a token for each"):
        Answer(mode="characters")(["abc"], [[0]], answer=["abc"])
