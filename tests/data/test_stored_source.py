"""Cached rows and ids are equal to those that were read, and nothing is read twice."""

from __future__ import annotations

import datetime
import os

import pytest

from rlft.algos.online.rollouts import _check_room
from rlft.core.errors import ConfigError
from rlft.data import examples as kept_examples
from rlft.data import prompts
from rlft.data.completions import CompletionData
from rlft.data.files import Csv, Jsonl, Parquet, TextFile
from rlft.data.labelled import LabelledData
from rlft.data.preferences import PreferenceData
from rlft.data.prompts import PromptData
from rlft.data.records import RecordSource
from rlft.data.source import SPLITS, Row
from rlft.data.store import Lazy
from rlft.data.stored_source import StoredSource
from rlft.data.text import TextData
from rlft.text.bpe import trained_bpe
from rlft.text.characters import characters

HALF = {"validation": 0.25, "test": 0.25}
RECORDS = [
    {"prompt": f"{i} Über 漢字", "completion": f"c {i}", "chosen": f"c {i}", "rejected": f"r {i}", "label": i % 2,
     "tags": [1, None, {"a": 1.5e300}], **({"x": i} if i % 3 else {"y": "\ud800"})}
    for i in range(60)
]  # fmt: skip


@pytest.fixture
def unread(monkeypatch):
    """Returns a function after which a source that reads its inputs fails."""

    def start():
        def read(self, *_):
            raise AssertionError("the inputs were read again")

        for cls in (Jsonl, Csv, TextFile, RecordSource):
            monkeypatch.setattr(cls, "read", read)

    return start


def everything(source):
    return source.counts, [list(source.rows(split)) for split in SPLITS]


def in_memory(source):
    """The rows of a source without the cache."""
    splits, counts = StoredSource._read_in_memory(source)
    return counts, [list(splits[split]) for split in SPLITS]


@pytest.mark.parametrize("split", [False, True])
def test_kept_rows_are_those_that_were_read(write_jsonl, unread, split):
    path = write_jsonl(RECORDS)
    path = {"train": path, "test": write_jsonl(RECORDS[:5], "test.jsonl")} if split else path
    expected = in_memory(Jsonl(path, **HALF))
    assert everything(Jsonl(path, **HALF)) == expected
    unread()
    assert everything(Jsonl(path, **HALF)) == expected


def test_rows_of_a_split_come_in_the_order_of_their_hashes(write_jsonl, make_source):
    texts = [f"text {i}" for i in range(50)]
    source = Jsonl(write_jsonl([{"prompt": text} for text in texts]), validation=0.2, test=0.1)
    for split in SPLITS:
        assert [row.text for row in source.rows(split)] == [row.text for row in make_source(texts).rows(split)]


def test_a_changed_file_or_setting_is_read_again(write_jsonl):
    path = write_jsonl([{"prompt": "a", "text": "b"}])
    source = Jsonl(path, validation=0, test=0)
    assert [row.text for row in source.rows("train")] == ["a"]
    other = Jsonl(path, validation=0, test=0, prompt_column="text")
    assert [row.text for row in other.rows("train")] == ["b"]
    write_jsonl([{"prompt": "c", "text": "b"}])  # of the same size
    os.utime(path, ns=(1, 1))
    assert [row.text for row in Jsonl(path, validation=0, test=0).rows("train")] == ["c"]


def test_what_json_would_change_is_read_at_each_start(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [{"prompt": "a", "day": datetime.date(2020, 1, 2)}, {"prompt": "b", "day": None}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    source = Parquet(str(tmp_path / "a.parquet"), validation=0, test=0)
    assert {row.text: row.columns["day"] for row in source.rows("train")} == {"a": records[0]["day"], "b": None}


def test_a_users_own_class_is_read_at_each_start(write_jsonl, own_cache):
    class Own(Jsonl):
        def records(self, path):
            for where, record in super().records(path):
                yield where, record | {"prompt": record["prompt"].upper()}

    path = write_jsonl([{"prompt": "a"}])
    assert [r.text for r in Own(path, validation=0, test=0).rows("train")] == ["A"]
    assert Own(path).key is None and not (own_cache / "data").exists()


def made(kind, source, tokenizer):
    data = {
        "prompts": lambda: PromptData(source, tokenizer=tokenizer),
        "openings": lambda: PromptData(source, tokenizer=tokenizer, prompt_tokens=2),
        "completions": lambda: CompletionData(source, tokenizer=tokenizer),
        "preferences": lambda: PreferenceData(source, tokenizer=tokenizer),
        "labelled": lambda: LabelledData(source, tokenizer=tokenizer, truncate=True, max_tokens=9),
        "text": lambda: TextData(source, tokenizer=tokenizer, block_size=8),
    }[kind]()
    name = {"prompts": "prompts", "openings": "prompts", "text": "tokens"}.get(kind, "examples")
    return data.counts, [list(getattr(data, name)(split)) for split in SPLITS], data.batch(3, size=4, seed=1)


class Unkeyed:
    """A source with the rows of another source, but without its key."""

    def __init__(self, source):
        self.counts, self.splits = source.counts, {split: list(source.rows(split)) for split in SPLITS}

    def rows(self, split: str) -> list[Row]:
        return self.splits[split]


@pytest.mark.parametrize("kind", ["prompts", "openings", "completions", "preferences", "labelled", "text"])
def test_the_second_start_reads_nothing_and_tokenises_nothing(write_jsonl, make_tokenizer, unread, kind):
    path = write_jsonl(RECORDS)
    expected = made(kind, Unkeyed(Jsonl(path, **HALF)), make_tokenizer())
    first = made(kind, Jsonl(path, **HALF), make_tokenizer())
    unread()
    tokenizer = make_tokenizer()
    again = made(kind, Jsonl(path, **HALF), tokenizer)
    assert not tokenizer.calls
    assert str(first) == str(again) == str(expected)  # as text: blocks are tensors
    assert again[:2] == expected[:2]


def test_another_tokenizer_or_setting_gives_other_ids(write_jsonl, make_tokenizer):
    path = write_jsonl([{"prompt": "ab"}])

    def ids(**knobs):
        source = Jsonl(path, validation=0, test=0)
        return [
            p.ids for p in PromptData(source, tokenizer=make_tokenizer(knobs.pop("eos", 256)), **knobs).prompts("train")
        ]

    assert ids() == [[97, 98]] and ids(prompt_tokens=1) == [[97]] and ids(prompt_tokens=0) == [[256]]
    assert ids(prompt_tokens=0, eos=255) == [[255]]


def test_another_chat_template_gives_other_prompts(write_jsonl, invented, make_source):
    bpe = trained_bpe(source=make_source(invented), vocab_size=300)
    path = write_jsonl([{"prompt": [{"role": "user", "content": "hi"}]}])
    texts = []
    for template in (None, "A{{ messages[0].content }}", "B{{ messages[0].content }}"):
        bpe.hf.chat_template = template
        texts += [p.text for p in PromptData(Jsonl(path, validation=0, test=0), tokenizer=bpe).prompts("train")]
    assert texts == ["hi", "Ahi", "Bhi"]


def test_prompts_of_a_users_own_class_are_never_those_of_its_base(write_jsonl, tokenizer):
    class Mine(PromptData):
        def prompt(self, row, text, ids):
            return super().prompt(row, f"mine: {text}", ids)

    source = Jsonl(str(write_jsonl([{"prompt": f"film {i}"} for i in range(30)])))
    theirs = PromptData(source, tokenizer=tokenizer).prompts("train")
    assert [prompt.text for prompt in Mine(source, tokenizer=tokenizer).prompts("train")] == [
        f"mine: {prompt.text}" for prompt in theirs
    ]


def test_no_prompt_or_example_is_made_until_it_is_asked_for(write_jsonl, tokenizer, monkeypatch):
    path = write_jsonl(RECORDS)
    for kind in ("prompts", "completions"):
        made(kind, Jsonl(path, **HALF), tokenizer)
    count = {"Row": 0, "Prompt": 0, "Example": 0}

    def counting(cls):
        def make(*args, **kwargs):
            count[cls.__name__] += 1
            return cls(*args, **kwargs)

        return make

    monkeypatch.setattr("rlft.data.stored_source.Row", counting(Row))
    monkeypatch.setattr(prompts, "Prompt", counting(prompts.Prompt))
    monkeypatch.setattr(kept_examples, "Example", counting(kept_examples.Example))
    source = Jsonl(path, **HALF)
    data, examples = PromptData(source, tokenizer=tokenizer), CompletionData(source, tokenizer=tokenizer)
    held, rows = [data.prompts("train"), examples.examples("train")], source.rows("train")
    assert all(isinstance(one, Lazy) and len(one) == len(rows) > 10 for one in [*held, rows])
    assert data.counts and examples.counts and prompts.prompt_lengths(held[0]).min() > 0
    assert kept_examples.example_lengths(held[1]).min() > 0
    assert count == {"Row": 0, "Prompt": 0, "Example": 0}
    data.batch(0, size=3, seed=0)
    assert count == {"Row": 3, "Prompt": 3, "Example": 0}


def test_tokenizers_made_from_a_source_read_it_once(write_jsonl, unread):
    path = write_jsonl([{"prompt": f"the kettle {i}"} for i in range(50)])
    bpe, alphabet = trained_bpe(source=Jsonl(path), vocab_size=270), characters(source=Jsonl(path))
    unread()

    def rows(self, split):
        raise AssertionError("the rows were read again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Jsonl, "rows", rows)
        assert trained_bpe(source=Jsonl(path), vocab_size=270).fingerprint == bpe.fingerprint
        assert characters(source=Jsonl(path)).alphabet == alphabet.alphabet


def test_the_check_of_room_names_the_longest_prompt(write_jsonl, tokenizer):
    path = write_jsonl([{"prompt": "a" * n} for n in (3, 9, 4)])
    data = PromptData(Jsonl(path, validation=0, test=0), tokenizer=tokenizer)
    _check_room(data, max_new_tokens=1, context_length=10)
    with pytest.raises(ConfigError, match=r"data.jsonl:2: a prompt of 9 tokens"):
        _check_room(data, max_new_tokens=2, context_length=10)
