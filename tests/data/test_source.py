from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlft.core.errors import ConfigError
from rlft.data.source import SPLITS, Row, check_split, given_splits, normalised, split_rows


def split_of(text, **fractions):
    splits, _ = split_rows([Row(text)], **fractions)
    return next(name for name in SPLITS if splits[name])


def test_split_is_the_hash_of_the_text_read_as_a_number():
    number = int(hashlib.sha256(b"a kettle").hexdigest()[:16], 16) / 2**64
    assert split_of("a kettle", validation=0.0, test=number + 1e-9) == "test"
    assert split_of("a kettle", validation=number - 0.1 + 1e-9, test=0.1) == "validation"
    assert split_of("a kettle", validation=number - 0.1 - 1e-9, test=0.1) == "train"


def test_split_sizes_follow_the_fractions():
    _, found = split_rows([Row(f"text {i}") for i in range(4000)], validation=0.2, test=0.1)
    assert abs(found["validation"] / 4000 - 0.2) < 0.03  # 4 standard deviations
    assert abs(found["test"] / 4000 - 0.1) < 0.02


@given(st.lists(st.text(max_size=8)), st.randoms())
def test_splits_depend_neither_on_the_order_nor_on_other_rows(texts, rng):
    texts = list({normalised(text): text for text in texts}.values())
    shuffled = rng.sample(texts, len(texts))
    splits, _ = split_rows([Row(text) for text in texts], validation=0.3, test=0.3)
    again, _ = split_rows([Row(text) for text in shuffled], validation=0.3, test=0.3)
    fewer, _ = split_rows([Row(text) for text in shuffled[::2]], validation=0.3, test=0.3)
    assert splits == again
    for name in SPLITS:
        assert {row.text for row in fewer[name]} <= {row.text for row in splits[name]}


@given(st.lists(st.sampled_from(["a b", "a  b", " a b\n", "c", "d", "e", "f", ""])))
def test_only_equal_texts_are_duplicates_and_near_equal_ones_share_a_split(texts):
    splits, counts = split_rows([Row(text) for text in texts], validation=0.3, test=0.3)
    kept = [row.text for name in SPLITS for row in splits[name]]
    assert sorted(kept) == sorted(set(texts))
    assert counts["duplicates"] == len(texts) - len(kept)
    assert {name: counts[name] for name in SPLITS} == {name: len(splits[name]) for name in SPLITS}
    forms = [{normalised(row.text) for row in splits[name]} for name in SPLITS]
    assert sum(map(len, forms)) == len(set.union(*forms))


def test_of_duplicates_the_first_is_kept():
    splits, counts = split_rows([Row("a b", where="f:1"), Row("a b", where="f:2")], validation=0, test=0)
    assert [row.where for row in splits["train"]] == ["f:1"]
    assert counts["duplicates"] == 1


def test_texts_that_differ_in_white_space_alone_never_leak_between_given_splits():
    splits, counts = given_splits({"train": [Row("if x:\n  y"), Row("a")], "test": [Row("if x:\n    y")]})
    assert [row.text for row in splits["train"]] == ["a"] and len(splits["test"]) == 1
    assert counts["leaked"] == 1


def test_a_sorted_file_is_mixed():
    texts = [f"text {i:04}" for i in range(1000)]
    splits, _ = split_rows([Row(text) for text in texts], validation=0.2, test=0.1)
    first = [int(row.text[-4:]) for row in splits["train"][:100]]
    assert 350 < sum(first) / 100 < 650  # mean of 100 of 0..999: 500 with a standard deviation of 29


def test_given_splits_keep_their_order_and_lose_what_leaks():
    rows = {"train": ["z", "a", "b", "a"], "validation": ["y", "b"], "test": ["y", "x"]}
    splits, counts = given_splits({name: [Row(text) for text in texts] for name, texts in rows.items()})
    assert {name: [row.text for row in splits[name]] for name in SPLITS} == {
        "train": ["z", "a"],
        "validation": ["b"],
        "test": ["y", "x"],
    }
    assert counts == {"duplicates": 1, "leaked": 2, "train": 2, "validation": 1, "test": 2}


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(validation, test):
    with pytest.raises(ConfigError, match=f"validation={validation}, test={test}"):
        split_rows([], validation=validation, test=test)


def test_unknown_split_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"got 'validaton' .did you mean 'validation'"):
        check_split("validaton")


def test_random_module_is_not_touched():
    state = random.getstate()
    split_rows([Row("a"), Row("b")])
    assert random.getstate() == state
