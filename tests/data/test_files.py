from __future__ import annotations

import sys

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.data.files import Csv, HuggingFaceData, Jsonl, Parquet, TextFile
from rlft.data.source import SPLITS, Row

WHOLE = {"validation": 0.0, "test": 0.0}
RECORDS = [{"prompt": "2 + 2 =", "answer": 4}, {"prompt": "3 + 5 =", "answer": 8}]


def write(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def by_place(source, split="train"):
    return sorted((row.where.rpartition("/")[2], row.text, row.columns) for row in source.rows(split))


def test_jsonl_rows_have_text_columns_and_place(tmp_path):
    path = write(tmp_path, '\ufeff{"prompt": "2 + 2 =", "answer": 4}\n\n{"prompt": "3 + 5 =", "answer": 8}')
    assert by_place(Jsonl(path, **WHOLE)) == [
        ("data.jsonl:1", "2 + 2 =", {"answer": 4}),
        ("data.jsonl:3", "3 + 5 =", {"answer": 8}),
    ]


def test_a_column_that_a_row_lacks_is_none_there(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "x": 1}\n{"prompt": "b", "y": [2]}\n')
    assert [row[2] for row in by_place(Jsonl(path, **WHOLE))] == [{"x": 1, "y": None}, {"x": None, "y": [2]}]


BAD_ROWS = {
    "not JSON": '{"prompt": "b"',
    "not UTF-8": b'{"prompt": "\xff"}',
    "an object with named columns, got list": '["b"]',
    "no column 'prompt' (did you mean 'promt'?); the columns are promt": '{"promt": "b"}',
    "got int": '{"prompt": 3}',
    "got NoneType": '{"prompt": null}',
    "got an empty list": '{"prompt": []}',
    "got the message hi": '{"prompt": ["hi"]}',
    "got the message {'role': 'user'}": '{"prompt": [{"role": "user"}]}',
    "role is one of system, user": '{"prompt": [{"role": "usr", "content": "b"}]}',
    "'completions' has the name of an argument": '{"prompt": "b", "completions": 1}',
    "lone surrogate, U+D800, at character 1": '{"prompt": "b\\ud800"}',
    "half of a character": '{"prompt": [{"role": "user", "content": "\\ud800"}]}',
}


def with_bad_row(tmp_path, row):
    row = row if isinstance(row, bytes) else row.encode()
    return write(tmp_path, b'{"prompt": "a"}\n\n' + row + b'\n{"prompt": "c"}\n')


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS.items())
def test_bad_row_is_refused_with_file_and_line(tmp_path, reason, row):
    with pytest.raises(DataError) as caught:
        Jsonl(with_bad_row(tmp_path, row)).rows("train")
    assert f"{tmp_path}/data.jsonl:3: " in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("row", BAD_ROWS.values())
def test_bad_row_is_skipped_and_counted_where_asked_for(tmp_path, row):
    source = Jsonl(with_bad_row(tmp_path, row), on_bad_row="skip", **WHOLE)
    assert [text for _, text, _ in by_place(source)] == ["a", "c"]
    assert source.num_skipped == 1
    assert source.counts == {"rows": 3, "skipped": 1, "duplicates": 0, "train": 2, "validation": 0, "test": 0}


@pytest.mark.parametrize(("text", "knob"), [("", "error"), ("3\n[]\n", "skip")])
def test_file_without_a_usable_row_is_refused(tmp_path, text, knob):
    with pytest.raises(DataError, match="no row can be used"):
        Jsonl(write(tmp_path, text), on_bad_row=knob).rows("train")


def test_same_prompt_with_another_answer_is_no_duplicate_but_never_in_another_split(write_jsonl):
    records = [{"prompt": f"{i}", "answer": a} for i in range(60) for a in (1, 2, 2)]
    source = Jsonl(write_jsonl(records), validation=0.3, test=0.3)
    splits = [{row.text for row in source.rows(split)} for split in SPLITS]
    assert source.counts["duplicates"] == 60
    assert sum(len(source.rows(split)) for split in SPLITS) == 120
    assert all(splits) and sum(map(len, splits)) == len(set.union(*splits)) == 60


def test_each_split_may_have_its_own_file(write_jsonl):
    inputs = {
        "train": write_jsonl([{"prompt": p, "x": 1} for p in "zabz"], "train.jsonl"),
        "test": write_jsonl([{"prompt": p} for p in "ya"], "test.jsonl"),
    }
    source = Jsonl(inputs)
    assert [row.text for row in source.rows("train")] == ["z", "b"]
    assert [row.text for row in source.rows("test")] == ["y", "a"]
    assert source.counts == {
        "rows": 6,
        "skipped": 0,
        "duplicates": 1,
        "leaked": 1,
        "train": 2,
        "validation": 0,
        "test": 2,
    }
    assert source.rows("test")[0].columns == {"x": None}


def test_another_column_may_hold_the_text(write_jsonl):
    source = Jsonl(write_jsonl([{"text": "a", "prompt": "b"}]), prompt_column="text", **WHOLE)
    assert [(row.text, row.columns) for row in source.rows("train")] == [("a", {"prompt": "b"})]


def test_csv_rows_have_strings_and_the_line_that_they_start_at(tmp_path):
    path = write(tmp_path, 'prompt,answer\r\n"a\r\nb, ""c""",1\r\n\r\nd,\r\n', "data.csv")
    assert by_place(Csv(path, **WHOLE)) == [
        ("data.csv:2", 'a\r\nb, "c"', {"answer": "1"}),
        ("data.csv:5", "d", {"answer": ""}),
    ]


def test_a_csv_field_may_be_as_long_as_a_text(tmp_path):
    path = write(tmp_path, f"prompt,answer\n{'a b ' * 50_000},1\n", "data.csv")
    assert len(Csv(path, **WHOLE).rows("train")[0].text) == 200_000


def test_csv_row_of_another_width_is_refused_or_counted(tmp_path):
    path = write(tmp_path, "prompt,answer\na,1\nb\nc,3,3\n", "data.csv")
    with pytest.raises(DataError, match=r"data.csv:3: 1 values for the 2 columns"):
        Csv(path).rows("train")
    assert Csv(path, on_bad_row="skip", **WHOLE).num_skipped == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt\n"a\nb\n', "data.csv:3: not CSV"),
        ("prompt,x,x\na,1,1\n", "data.csv:1: the header names x twice"),
        (b"prompt\na\n\xff\n", "data.csv:3: not UTF-8 at byte 0"),
        ("question\na\n", "data.csv:2: there is no column 'prompt'"),
        ("", "no row can be used"),
    ],
)
def test_csv_that_cannot_be_read_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        Csv(write(tmp_path, text, "data.csv")).rows("train")


def test_parquet_rows_keep_their_types_and_conversations(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [
        {"prompt": [{"role": "user", "content": "2 + 2 ="}], "answer": 4, "tags": ["sum"]},
        {"prompt": [{"role": "user", "content": "3 + 5 ="}], "answer": 8, "tags": []},
    ]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    source = Parquet(str(path), **WHOLE)
    assert by_place(source) == [
        ("data.parquet:1", "2 + 2 =", {"answer": 4, "tags": ["sum"]}),
        ("data.parquet:2", "3 + 5 =", {"answer": 8, "tags": []}),
    ]
    assert all(row.messages == ({"role": "user", "content": row.text},) for row in source.rows("train"))


def test_file_that_is_not_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"data.parquet: not a Parquet file"):
        Parquet(write(tmp_path, "prompt\n", "data.parquet")).rows("train")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return datasets


@pytest.mark.usefixtures("datasets")
def test_directory_of_data_files_is_a_hugging_face_data_set(tmp_path, write_jsonl):
    (tmp_path / "set").mkdir()
    write_jsonl(RECORDS, "set/train.jsonl")
    write_jsonl([{"prompt": "1 + 1 =", "answer": 2}], "set/test.jsonl")
    source = HuggingFaceData(str(tmp_path / "set"), split={"train": "train", "validation": "test"})
    assert [(row.text, row.columns) for row in source.rows("train")] == [
        ("2 + 2 =", {"answer": 4}),
        ("3 + 5 =", {"answer": 8}),
    ]
    assert source.rows("validation") == [Row("1 + 1 =", {"answer": 2}, f"{tmp_path}/set[test]:1")]


def test_saved_data_set_is_read_from_disk(tmp_path, datasets):
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        source = HuggingFaceData(str(tmp_path / name), **WHOLE)
        assert by_place(source) == [
            (f"{name}[train]:{i}", r["prompt"], {"answer": r["answer"]}) for i, r in enumerate(RECORDS, 1)
        ]
    with pytest.raises(DataError, match=r"split=tset. cannot be loaded"):
        HuggingFaceData(str(tmp_path / "dict"), split="tset").rows("train")


def test_hub_that_cannot_be_reached_is_an_error_that_names_the_ways_on(datasets, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"path=some/name .*cannot be loaded: ConnectionError.*data/source=jsonl"):
        HuggingFaceData("some/name").rows("train")


@pytest.mark.parametrize(("source", "module"), [(Parquet, "pyarrow"), (HuggingFaceData, "datasets")])
def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, source, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{module}, which is not installed: pip install 'rlft\[data\]'"):
        source(write(tmp_path, ""))


def test_text_file_of_paragraphs_and_of_lines(tmp_path):
    path = write(tmp_path, "\ufeffone\ntwo\n\n \n\nthree\r\n\r\nfour", "data.txt")
    assert by_place(TextFile(path, **WHOLE)) == [
        ("data.txt:1", "one\ntwo", {}),
        ("data.txt:6", "three", {}),
        ("data.txt:8", "four", {}),
    ]
    lines = TextFile(path, documents="lines", **WHOLE)
    assert [place[:2] for place in by_place(lines)] == [
        ("data.txt:1", "one"),
        ("data.txt:2", "two"),
        ("data.txt:6", "three"),
        ("data.txt:8", "four"),
    ]


def test_text_file_counts_duplicates_and_takes_a_file_for_each_split(tmp_path):
    inputs = {"train": write(tmp_path, "b\n\na\n\nb\n", "a.txt"), "validation": write(tmp_path, "a\n", "b.txt")}
    source = TextFile(inputs)
    assert [row.text for row in source.rows("train")] == ["b"]
    assert source.counts == {"rows": 4, "duplicates": 1, "leaked": 1, "train": 1, "validation": 1, "test": 0}


def test_text_file_that_is_not_utf8_is_refused_with_file_and_line(tmp_path):
    with pytest.raises(DataError, match=r"data.txt:2: not UTF-8 at byte 1"):
        TextFile(write(tmp_path, b"ok\nb\xe9\n", "data.txt")).rows("train")


@pytest.mark.parametrize("source", [TextFile, Jsonl, Csv])
def test_wrong_arguments_are_refused_in_the_constructor(tmp_path, source):
    path = write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no such file .*absent.txt"):
        source("absent.txt")
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        source({"train": path, "valid": path})
    with pytest.raises(ConfigError, match="the train split is missing"):
        source({"test": path})
    with pytest.raises(ConfigError, match="together less than 1"):
        source(path, validation=0.6, test=0.6)
    knob = "documents" if source is TextFile else "on_bad_row"
    with pytest.raises(ConfigError, match=f"{knob} is one of .*got 'x'"):
        source(path, **{knob: "x"})


def shards(tmp_path):
    for name, texts in (("b", "pq"), ("a", "rs"), ("c", "tu")):
        write(tmp_path, "".join(f'{{"prompt": "{text}"}}\n' for text in texts), f"{name}.jsonl")
    return tmp_path


def test_several_files_are_one_source_in_the_order_given(tmp_path):
    names = [str(shards(tmp_path) / f"{name}.jsonl") for name in "bca"]
    source = Jsonl({"train": names, "test": str(tmp_path / "*.jsonl")})
    assert [row.text for row in source.rows("test")] == list("rspqtu")  # a pattern's files are sorted by name
    assert Jsonl({"train": names}).rows("train") == [
        Row(text, {}, f"{tmp_path}/{name}.jsonl:{line}")
        for name, line, text in zip("bbccaa", (1, 2) * 3, "pqturs", strict=True)
    ]


@pytest.mark.parametrize("join", [lambda d: [f"{d}/{n}.jsonl" for n in "abc"], lambda d: f"{d}/[abc].jsonl"])
def test_files_given_together_are_split_as_one(tmp_path, join):
    together = Jsonl(join(shards(tmp_path)), validation=0.3, test=0.3)
    parts = [Jsonl(str(tmp_path / f"{name}.jsonl"), validation=0.3, test=0.3) for name in "abc"]
    for split in SPLITS:
        assert by_place(together, split) == sorted(row for part in parts for row in by_place(part, split))
    assert together.counts["rows"] == 6


def test_text_files_and_csv_take_patterns_too(tmp_path):
    for name, text in (("a.txt", "one\n"), ("b.txt", "two\n"), ("a.csv", "prompt\none\n"), ("b.csv", "prompt\ntwo\n")):
        write(tmp_path, text, name)
    for cls, pattern in ((TextFile, "*.txt"), (Csv, "*.csv")):
        assert sorted(row.text for row in cls(str(tmp_path / pattern), **WHOLE).rows("train")) == ["one", "two"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    path = write(tmp_path, '{"prompt": "a"}\n', "[a].jsonl")
    write(tmp_path, '{"prompt": "b"}\n', "a.jsonl")
    assert [row.text for row in Jsonl(path, **WHOLE).rows("train")] == ["a"]


@pytest.mark.parametrize("path", [[], 3, [3], {"train": []}, "", {"train": {"train": "a"}}, None])
def test_a_path_that_is_none_is_refused(path):
    for cls in (Jsonl, TextFile):
        with pytest.raises(ConfigError, match=r"data.source.path=.*give a file, a list of files, a pattern"):
            cls(path)


def test_a_pattern_without_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no file matches"):
        Jsonl(str(tmp_path / "*.jsonl"))
    with pytest.raises(ConfigError, match=r"no such file .*c.jsonl"):
        Jsonl([write(tmp_path, "{}", "a.jsonl"), str(tmp_path / "c.jsonl")])


def test_texts_that_differ_in_white_space_alone_are_two_rows(write_jsonl):
    texts = ["if x:\n  y", "if x:\n    y", "if x:\n  y"]
    source = Jsonl(write_jsonl([{"prompt": text} for text in texts]), validation=0.4, test=0.3)
    assert [row.text for split in SPLITS for row in source.rows(split)] == texts[:2]
    assert sorted(len(source.rows(split)) for split in SPLITS) == [0, 0, 2]
    assert source.counts["duplicates"] == 1


@pytest.mark.parametrize(("name", "mark"), [("semicolon", ";"), ("tab", "\t"), ("pipe", "|"), ("comma", ",")])
def test_csv_may_be_separated_by_something_else_and_says_by_what_it_seems_to_be(tmp_path, name, mark):
    path = write(tmp_path, f'prompt{mark}answer\n"a{mark}b"{mark}1\n', "data.csv")
    for delimiter in (name, mark):
        assert by_place(Csv(path, delimiter=delimiter, **WHOLE)) == [("data.csv:2", f"a{mark}b", {"answer": "1"})]
    for knob in ("error", "skip"):
        other = Csv(path, delimiter="pipe" if name != "pipe" else "comma", on_bad_row=knob)
        with pytest.raises(DataError, match=rf"data.csv:1: .*by {name}s \(prompt, answer\).*source.delimiter={name}$"):
            other.rows("train")


def test_csv_that_is_separated_as_said_is_not_suspected(tmp_path):
    path = write(tmp_path, "a;b,prompt\n1;2,x\n", "data.csv")
    assert [(row.text, row.columns) for row in Csv(path, **WHOLE).rows("train")] == [("x", {"a;b": "1;2"})]
    with pytest.raises(DataError, match="there is no column 'prompt'"):
        Csv(write(tmp_path, "a;b,c\n1;2,x\n", "other.csv")).rows("train")


@pytest.mark.parametrize("delimiter", ["", "semicolons", '"', "\n", ",,"])
def test_wrong_delimiter_is_refused(tmp_path, delimiter):
    with pytest.raises(ConfigError, match=r"data.source.delimiter=.* is one character .*semicolon, tab"):
        Csv(write(tmp_path, "prompt\na\n"), delimiter=delimiter)
