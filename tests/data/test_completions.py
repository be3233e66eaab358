"""Completions, preferences and unpaired labels: the examples made from rows, and the rows that are refused."""

from __future__ import annotations

import json

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.data.completions import CompletionData
from rlft.data.files import Csv, Jsonl
from rlft.data.labelled import UnpairedData
from rlft.data.preferences import PreferenceData
from rlft.data.source import SPLITS
from rlft.text.bpe import trained_bpe

EOS = 256  # of the byte tokenizer
WHOLE = {"validation": 0, "test": 0}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def bpe(invented, make_source):
    return trained_bpe(source=make_source(invented), vocab_size=320)


def ids(text: str) -> list[int]:
    return [*text.encode(), EOS]


def message(content, role="user"):
    return {"role": role, "content": content}


def answer(content):
    return [message(content, "assistant")]


def by_prompt(data, split="train"):
    return {example.prompt.text: example.completions for example in data.examples(split)}


# Examples that are made from rows.


def test_completion_is_encoded_by_itself_and_ends_the_text(write_jsonl, tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "2 + 2 =", "completion": " 4", "n": 1}]), **WHOLE)
    (example,) = CompletionData(source, tokenizer=tokenizer).examples("train")
    assert (example.prompt.text, example.prompt.ids) == ("2 + 2 =", list(b"2 + 2 ="))
    assert example.completions == (ids(" 4"),)
    assert example.prompt.columns["n"] == 1 and example.prompt.where.endswith("data.jsonl:1")
    assert example.num_tokens == 7 + 3


@pytest.mark.parametrize(("ends", "counts"), [(False, 0), ("false", 0), (0, 0), (True, 1), ("1", 1), (None, 1)])
def test_completion_that_was_cut_short_does_not_end_the_text(write_jsonl, tokenizer, ends, counts):
    source = Jsonl(write_jsonl([{"prompt": "a", "completion": "bc", "completion_ends": ends}]), **WHOLE)
    assert by_prompt(CompletionData(source, tokenizer=tokenizer)) == {"a": ([*b"bc", *[EOS] * counts],)}


def test_each_completion_of_a_pair_may_be_cut_short(write_jsonl, tokenizer):
    records = [{"prompt": "a", "chosen": "x", "rejected": "y", "rejected_ends": False}, {"prompt": "b", "chosen": "x",
               "rejected": "x", "rejected_ends": False}]  # fmt: skip
    data = PreferenceData(Jsonl(write_jsonl(records), **WHOLE), tokenizer=tokenizer)
    assert by_prompt(data) == {"a": (ids("x"), [*b"y"]), "b": (ids("x"), [*b"x"])}


def test_tokenizer_without_an_end_token_appends_none(write_jsonl, make_tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "a", "completion": "bc"}]), **WHOLE)
    assert by_prompt(CompletionData(source, tokenizer=make_tokenizer(eos_id=None))) == {"a": (list(b"bc"),)}


def test_empty_completion_is_the_end_token_and_an_empty_prompt_too(write_jsonl, tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "", "completion": ""}]), **WHOLE)
    (example,) = CompletionData(source, tokenizer=tokenizer).examples("train")
    assert (example.prompt.ids, example.completions) == ([EOS], ([EOS],))


def test_pairs_are_chosen_and_rejected(write_jsonl, tokenizer):
    records = [{"prompt": "a", "chosen": "good", "rejected": "bad"}, {"prompt": "b", "chosen": "x", "rejected": ""}]
    data = PreferenceData(Jsonl(write_jsonl(records), **WHOLE), tokenizer=tokenizer)
    assert by_prompt(data) == {"a": (ids("good"), ids("bad")), "b": (ids("x"), ids(""))}


def test_columns_may_have_other_names(tmp_path, tokenizer):
    path = tmp_path / "data.csv"
    path.write_text("question,better,worse\na,b,c\n")
    data = PreferenceData(
        Csv(str(path), prompt_column="question", **WHOLE), tokenizer=tokenizer, chosen_column="better",
        rejected_column="worse",
    )  # fmt: skip
    assert by_prompt(data) == {"a": (ids("b"), ids("c"))}


@pytest.mark.parametrize(
    ("value", "label"), [(True, 1), (False, 0), (1, 1), (0, 0), ("true", 1), ("False", 0), ("1", 1), ("0", 0)]
)
def test_a_judgement_is_true_or_false(write_jsonl, tokenizer, value, label):
    source = Jsonl(write_jsonl([{"prompt": "a", "completion": "b", "label": value}]), **WHOLE)
    (example,) = UnpairedData(source, tokenizer=tokenizer).examples("train")
    assert (example.completions, example.label) == ((ids("b"),), label)


# Rows without a prompt, and conversations.


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "ends"),
    [
        ("Q: hi\n\nA: yes", "Q: hi\n\nA: no", "Q: hi\n\nA:", (" yes", " no")),
        ("the cat sat on mats", "the cat sat on maps", "the cat sat on", (" mats", " maps")),  # not within a word
        ("Why?\n\nSo.", "Why?\n\nNo.", "Why?", ("\n\nSo.", "\n\nNo.")),
        ("A: yes", "A: yes indeed", "A:", (" yes", " yes indeed")),
        ("abc", "abd", "", ("abc", "abd")),
        ("x", "", "", ("x", "")),
    ],
)
def test_prompt_that_is_left_out_is_what_both_texts_share(write_jsonl, tokenizer, chosen, rejected, prompt, ends):
    source = Jsonl(write_jsonl([{"chosen": chosen, "rejected": rejected}]), **WHOLE)
    (example,) = PreferenceData(source, tokenizer=tokenizer).examples("train")
    assert example.prompt.text == prompt
    assert example.completions == (ids(ends[0]), ids(ends[1]))


def test_a_prompt_that_is_given_stays_as_it_is(write_jsonl, tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "a", "chosen": "a b", "rejected": "a c"}]), **WHOLE)
    assert by_prompt(PreferenceData(source, tokenizer=tokenizer)) == {"a": (ids("a b"), ids("a c"))}


def test_pairs_of_a_prompt_that_is_left_out_are_never_in_two_splits(write_jsonl, tokenizer):
    records = [{"chosen": f"prompt {i} good {j}", "rejected": f"prompt {i} bad"} for i in range(60) for j in range(3)]
    data = PreferenceData(Jsonl(write_jsonl(records), validation=0.3, test=0.3), tokenizer=tokenizer)
    splits = [{example.prompt.text for example in data.examples(split)} for split in SPLITS]
    assert all(splits) and sum(map(len, splits)) == len(set.union(*splits)) == 60


def test_conversation_becomes_what_the_template_writes_behind_the_prompt(write_jsonl, bpe):
    bpe.hf.chat_template = TEMPLATE
    records = [{"prompt": [message("the kettle")], "chosen": answer("hums"), "rejected": answer("a bridge")}]
    (example,) = PreferenceData(Jsonl(write_jsonl(records), **WHOLE), tokenizer=bpe).examples("train")
    assert example.prompt.text == "<|user|>the kettle<|endoftext|><|assistant|>"
    assert example.completions == ([*bpe.encode("hums"), bpe.eos_id], [*bpe.encode("a bridge"), bpe.eos_id])


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}])
def test_conversations_that_hold_the_prompt_are_divided(write_jsonl, bpe, prompt):
    bpe.hf.chat_template = TEMPLATE
    shared = [message("be kind", "system"), message("the kettle")]
    records = [prompt | {"chosen": shared + answer("hums"), "rejected": shared + answer("a bridge")}]
    (example,) = PreferenceData(Jsonl(write_jsonl(records), **WHOLE), tokenizer=bpe).examples("train")
    assert example.prompt.text == "<|system|>be kind<|endoftext|><|user|>the kettle<|endoftext|><|assistant|>"
    assert [len(ids) for ids in example.completions] == [len(bpe.encode(t)) + 1 for t in ("hums", "a bridge")]


def test_without_a_template_one_message_each_is_plain_text(write_jsonl, tokenizer):
    records = [{"prompt": [message("hi")], "completion": answer("hello")}]
    assert by_prompt(CompletionData(Jsonl(write_jsonl(records), **WHOLE), tokenizer=tokenizer)) == {
        "hi": (ids("hello"),)
    }


# Rows that cannot be used.

BAD_PAIRS = {
    "'chosen_ends' is true or false, got 'x'": {"prompt": "b", "chosen": "x", "rejected": "y", "chosen_ends": "x"},
    "'rejected' must be a string, as the prompt is, got NoneType": {"prompt": "b", "chosen": "x", "rejected": None},
    "'chosen' must be a string, as the prompt is, got int": {"prompt": "b", "chosen": 3, "rejected": "y"},
    "'chosen' must be a string, as the prompt is, got list": {"prompt": "b", "chosen": answer("x"), "rejected": "y"},
    "'chosen' is a list with one message of the assistant, got x": {
        "prompt": [message("b")], "chosen": "x", "rejected": "y",
    },
    "one message of the assistant, got [{'role': 'user'": {
        "prompt": [message("b")], "chosen": [message("x")], "rejected": answer("y"),
    },
    "got the message {'role': 'assistant'}": {
        "prompt": [message("b")], "chosen": [{"role": "assistant"}], "rejected": answer("y"),
    },
    "lone surrogate, U+D800": {"prompt": "b", "chosen": "x\ud800", "rejected": "y"},
    "the chosen and the rejected completion are equal": {"prompt": "b", "chosen": "x", "rejected": "x"},
    "have 9 tokens, more than data.max_tokens=8": {"prompt": "bbb", "chosen": "xxxxx", "rejected": "y"},
}  # fmt: skip
REASONS = {"equal": "equal", "more than": "too_long"}


def with_bad_row(tmp_path, record) -> str:
    good = {"prompt": "a", "chosen": "x", "rejected": "y"}
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(one) for one in (good, record, good | {"prompt": "c"})) + "\n")
    return str(path)


@pytest.mark.parametrize(("message", "record"), BAD_PAIRS.items())
def test_bad_pair_is_refused_with_file_and_line(tmp_path, tokenizer, message, record):
    path = with_bad_row(tmp_path, record)
    with pytest.raises(DataError) as caught:
        PreferenceData(Jsonl(path, **WHOLE), tokenizer=tokenizer, max_tokens=8).examples("train")
    assert f"{path}:3: " in str(caught.value) and message in str(caught.value)
    assert "data.on_unusable=skip leaves such rows out" in str(caught.value)


@pytest.mark.parametrize(("message", "record"), BAD_PAIRS.items())
def test_bad_pair_is_left_out_and_counted_where_asked_for(tmp_path, tokenizer, message, record):
    source = Jsonl(with_bad_row(tmp_path, record), **WHOLE)
    data = PreferenceData(source, tokenizer=tokenizer, max_tokens=8, on_unusable="skip")
    assert set(by_prompt(data)) == {"a", "c"}
    reason = next((name for part, name in REASONS.items() if part in message), "no_text")
    assert data.counts["train_examples"] == 2
    assert {name: data.counts[name] for name in data.reasons} == dict.fromkeys(data.reasons, 0) | {reason: 1}


@pytest.mark.parametrize("value", ["maybe", None, 2, 0.5, ""])
def test_label_that_is_no_judgement_is_refused_with_its_line(write_jsonl, tokenizer, value):
    path = write_jsonl([{"prompt": "a", "completion": "b", "label": value}])
    with pytest.raises(DataError, match=r"data\.jsonl:1: 'label' is true \(desirable\) or false, got"):
        UnpairedData(Jsonl(path, **WHOLE), tokenizer=tokenizer).examples("train")
    skipping = UnpairedData(Jsonl(path, **WHOLE), tokenizer=tokenizer, on_unusable="skip")
    assert skipping.counts["no_label"] == 1


def test_empty_completion_without_an_end_token_is_refused(write_jsonl, tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "a", "completion": "", "completion_ends": False}]), **WHOLE)
    with pytest.raises(DataError, match=r"data\.jsonl:1: 'completion' is empty, and no end-of-text token follows"):
        CompletionData(source, tokenizer=tokenizer).examples("train")


def test_missing_column_is_refused_with_the_nearest_name(write_jsonl, tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "a", "choosen": "b", "rejected": "c"}]), **WHOLE)
    with pytest.raises(
        DataError, match=r"no column 'chosen' \(did you mean 'choosen'\?\); beside the prompt there are"
    ):
        PreferenceData(source, tokenizer=tokenizer, on_unusable="skip").examples("train")


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        (TEMPLATE, {"completion": answer("hi<|endoftext|>")}, "control token '<|endoftext|>' as text"),
        ("{{ messages[-1].content }}", {"completion": answer("hi")}, "does not write the answer behind its prompt"),
    ],
)
def test_answer_that_cannot_be_rendered_is_refused_with_its_place(write_jsonl, bpe, template, record, reason):
    bpe.hf.chat_template = template
    source = Jsonl(write_jsonl([{"prompt": [message("the kettle")]} | record]), **WHOLE)
    with pytest.raises(DataError) as caught:
        CompletionData(source, tokenizer=bpe).examples("train")
    assert "data.jsonl:1: " in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("knobs", [{"max_tokens": 1}, {"on_unusable": "skipp"}])
def test_wrong_arguments_are_refused(make_source, tokenizer, knobs):
    with pytest.raises(ConfigError, match=r"data\.max_tokens is at least 2|did you mean 'skip'"):
        CompletionData(make_source([]), tokenizer=tokenizer, **knobs)


# Batches.


def numbered(write_jsonl, tokenizer, order: int = 1) -> PreferenceData:
    records = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(30)]
    return PreferenceData(Jsonl(write_jsonl(records[::order]), validation=0.2), tokenizer=tokenizer)


def test_batch_is_a_function_of_its_arguments_only(write_jsonl, tokenizer):
    data = numbered(write_jsonl, tokenizer)
    forwards = [[e.prompt.text for e in data.batch(step, size=5, seed=3)] for step in range(12)]
    other = numbered(write_jsonl, tokenizer, order=-1)
    for step in (11, 0, 4):
        assert [e.prompt.text for e in other.batch(step, size=5, seed=3)] == forwards[step]
    assert [e.prompt.text for e in data.batch(1, size=10, seed=3)] == forwards[2] + forwards[3]
    assert [e.prompt.text for e in data.batch(0, size=5, seed=4)] != forwards[0]


def test_each_epoch_covers_every_pair_exactly_once(write_jsonl, tokenizer):
    data = numbered(write_jsonl, tokenizer)
    number = len(data.examples("train"))
    drawn = [e.prompt.text for step in range(2 * number) for e in data.batch(step, size=1, seed=0)]
    assert sorted(drawn[:number]) == sorted(drawn[number:]) == sorted(e.prompt.text for e in data.examples("train"))


def test_batch_of_an_empty_split_is_refused(write_jsonl, tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "b"}]), **WHOLE)
    with pytest.raises(DataError, match=r"the train split has no example .*'equal': 1"):
        PreferenceData(source, tokenizer=tokenizer, on_unusable="skip").batch(0, size=1, seed=0)


def test_text_that_the_tokenizer_refuses_is_named_by_its_place(write_jsonl, tokenizer):
    source = Jsonl(write_jsonl([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "\0"}]), **WHOLE)
    with pytest.raises(DataError, match=r"data\.jsonl:2: the tokenizer cannot encode this text"):
        CompletionData(source, tokenizer=tokenizer).examples("train")
