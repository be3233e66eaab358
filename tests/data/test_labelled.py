"""Texts with a class: the classes' order, the labels that are refused, and texts that are too long."""

from __future__ import annotations

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.data.files import Csv, Jsonl
from rlft.data.labelled import LabelledData
from rlft.data.source import Row
from tests.algos.offline.builders import Memory

EOS = 256
WHOLE = {"validation": 0, "test": 0}


def source(write_jsonl, *records) -> Jsonl:
    rows = [{"text": text, "label": label} for text, label in records]
    return Jsonl({"train": write_jsonl(rows)}, prompt_column="text")


def test_example_is_the_text_with_the_end_token_and_the_index_of_its_class(write_jsonl, tokenizer):
    data = LabelledData(source(write_jsonl, ("good", "pos"), ("bad", "neg")), tokenizer=tokenizer)
    assert data.classes == ["neg", "pos"]
    found = [(example.prompt.ids, example.completions, example.label) for example in data.examples("train")]
    assert found == [([*b"good", EOS], (), 1), ([*b"bad", EOS], (), 0)]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 2, 0, 2], ["0", "2", "10"]),
        (["10", "2", "-1", "x"], ["-1", "2", "10", "x"]),
        ([True, False], ["False", "True"]),
        ([1, 0], ["0", "1"]),
    ],
)
def test_classes_are_numbers_by_size_and_names_by_the_alphabet(write_jsonl, tokenizer, labels, classes):
    data = LabelledData(source(write_jsonl, *[(f"t{i}", x) for i, x in enumerate(labels)]), tokenizer=tokenizer)
    assert data.classes == classes
    assert [classes[example.label] for example in data.examples("train")] == [str(label) for label in labels]


def test_csv_has_the_same_classes_as_json(tmp_path, tokenizer):
    path = tmp_path / "data.csv"
    path.write_text("text,label\na,1\nb,0\n")
    data = LabelledData(Csv({"train": str(path)}, prompt_column="text"), tokenizer=tokenizer)
    assert data.classes == ["0", "1"]
    assert [example.label for example in data.examples("train")] == [1, 0]


@pytest.mark.parametrize("label", [None, 0.5, "", ["x"]])
def test_text_without_a_label_is_refused_with_its_line_or_counted(write_jsonl, tokenizer, label):
    rows = source(write_jsonl, ("a", "x"), ("b", "y"), ("c", label))
    with pytest.raises(DataError, match=r"data\.jsonl:3: 'label' is one of x, y, got "):
        LabelledData(rows, tokenizer=tokenizer).examples("train")
    data = LabelledData(rows, tokenizer=tokenizer, on_unusable="skip")
    assert (data.counts["train_examples"], data.counts["no_label"]) == (2, 1)


def test_label_that_training_does_not_know_is_refused(tokenizer):
    train = [Row("a", {"label": "x"}, "a:1"), Row("b", {"label": "y"}, "a:2")]
    data = LabelledData(Memory(train, [Row("c", {"label": "z"}, "b:1")]), tokenizer=tokenizer)
    with pytest.raises(DataError, match="b:1: 'label' is one of x, y, got 'z'"):
        data.examples("validation")


def test_one_class_or_no_column_is_refused(write_jsonl, tokenizer):
    with pytest.raises(DataError, match="needs two classes; 'label' is x"):
        LabelledData(source(write_jsonl, ("a", "x"), ("b", "x")), tokenizer=tokenizer).examples("train")
    with pytest.raises(DataError, match=r"no column 'lable' \(did you mean 'label'\?\).* set data\.label_column"):
        LabelledData(source(write_jsonl, ("a", "x"), ("b", "y")), tokenizer=tokenizer, label_column="lable").examples(
            "train"
        )


def test_long_text_is_refused_or_counted_or_cut(write_jsonl, tokenizer):
    rows = source(write_jsonl, ("abc", "x"), ("abcd", "y"))
    assert len(LabelledData(rows, tokenizer=tokenizer, max_tokens=5).examples("train")) == 2
    with pytest.raises(DataError, match=r"data\.jsonl:2: .* 5 tokens, more than data\.max_tokens=4"):
        LabelledData(rows, tokenizer=tokenizer, max_tokens=4).examples("train")
    skipping = LabelledData(rows, tokenizer=tokenizer, max_tokens=4, on_unusable="skip")
    assert (skipping.counts["train_examples"], skipping.counts["too_long"]) == (1, 1)
    cut = LabelledData(rows, tokenizer=tokenizer, max_tokens=4, truncate=True)
    assert [example.prompt.ids for example in cut.examples("train")] == [[*b"abc", EOS]] * 2
    assert (cut.counts["truncated"], cut.counts["too_long"]) == (1, 0)


def test_empty_text_is_refused(write_jsonl, tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl:3: the text is empty"):
        LabelledData(source(write_jsonl, ("a", "x"), ("b", "y"), ("", "x")), tokenizer=tokenizer).examples("train")


def test_truncating_needs_a_length(make_source, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.truncate=true cuts texts to data\.max_tokens: set it"):
        LabelledData(make_source([]), tokenizer=tokenizer, truncate=True)
