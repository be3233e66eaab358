from __future__ import annotations

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.data.files import Jsonl
from rlft.data.prompts import PromptData
from rlft.data.source import SPLITS
from rlft.text.bpe import trained_bpe
from rlft.text.characters import characters

EOS = 256  # of the byte tokenizer
HUGE = "indivisible" * 100


@pytest.fixture
def bpe(invented, make_source):
    return trained_bpe(source=make_source(invented), vocab_size=320)


@pytest.mark.parametrize("num_tokens", [1, 5, 13])
def test_an_opening_is_a_prefix_of_its_texts_ids(invented, make_source, bpe, num_tokens):
    source = make_source(
        [
            *invented,
            HUGE,
            f"{HUGE} {HUGE}",
            *(f"  odd\n\n{i}\t white   space, {text}\n" for i, text in enumerate(invented)),
        ]
    )
    data = PromptData(source, tokenizer=bpe, prompt_tokens=num_tokens)
    whole = {row.where: bpe.encode(row.text) for split in SPLITS for row in source.rows(split)}
    prompts = [prompt for split in SPLITS for prompt in data.prompts(split)]
    held_out = {tuple(prompt.ids) for split in ("validation", "test") for prompt in data.prompts(split)}
    leaked = {
        row.where
        for row in source.rows("train")
        if len(ids := whole[row.where]) > num_tokens and tuple(ids[:num_tokens]) in held_out
    }
    enough = {where for where, ids in whole.items() if len(ids) > num_tokens}
    assert {prompt.where for prompt in prompts} == enough - leaked
    assert data.counts["leaked_openings"] == len(leaked)
    assert len(enough) > 140
    for prompt in prompts:
        assert prompt.ids == whole[prompt.where][:num_tokens]
        assert prompt.text == bpe.decode(prompt.ids)


def test_words_without_tokens_do_not_shorten_an_opening(make_source):
    class Digits:  # a tokenizer that drops everything but digits
        vocab_size, eos_id, hf, fingerprint = 10, None, None, "digits"

        def encode_batch(self, texts):
            return [[int(c) for c in text if c.isdigit()] for text in texts]

        def decode(self, ids):
            return "".join(map(str, ids))

    source = make_source(["many words and then " * 50 + "12345"], validation=0, test=0)
    (prompt,) = PromptData(source, tokenizer=Digits(), prompt_tokens=3).prompts("train")
    assert prompt.ids == [1, 2, 3]


def test_only_the_openings_are_encoded(make_source, tokenizer):
    source = make_source(["word " * 10_000], validation=0, test=0)
    PromptData(source, tokenizer=tokenizer, prompt_tokens=8).prompts("train")
    assert max(map(len, tokenizer.calls)) < 200


def test_texts_with_nothing_left_to_say_are_left_out_and_counted(make_source, tokenizer):
    data = PromptData(make_source(["abc", "abcd", "abcde"], validation=0, test=0), tokenizer=tokenizer, prompt_tokens=4)
    assert [(prompt.text, prompt.ids) for prompt in data.prompts("train")] == [("abcd", list(b"abcd"))]
    assert data.counts["too_short"] == 2 and data.counts["train_prompts"] == 1 and data.counts["rows"] == 3


def test_whole_texts_keep_every_token(invented, make_source, tokenizer):
    source = make_source(invented)
    data = PromptData(source, tokenizer=tokenizer)
    for split in SPLITS:
        assert [prompt.text for prompt in data.prompts(split)] == [row.text for row in source.rows(split)]
    assert all(prompt.ids == list(prompt.text.encode()) for prompt in data.prompts("train"))
    assert all(prompt.columns == {"length": len(prompt.text)} for prompt in data.prompts("train"))


def test_long_prompt_is_refused_with_its_place(make_source, tokenizer):
    source = make_source(["abc", "abcd"], validation=0, test=0)
    assert len(PromptData(source, tokenizer=tokenizer, max_prompt_tokens=4).prompts("train")) == 2
    with pytest.raises(DataError, match=r"list:2: the prompt has 4 tokens, more than data\.max_prompt_tokens=3"):
        PromptData(source, tokenizer=tokenizer, max_prompt_tokens=3).prompts("train")


def test_long_prompt_is_skipped_and_counted_where_asked_for(make_source, tokenizer):
    source = make_source(["abc", "abcd"], validation=0, test=0)
    data = PromptData(source, tokenizer=tokenizer, max_prompt_tokens=3, on_long="skip")
    assert [prompt.text for prompt in data.prompts("train")] == ["abc"]
    assert data.counts["too_long"] == 1


def test_empty_prompt_is_the_end_of_text_token(make_source, tokenizer):
    data = PromptData(make_source([""], validation=0, test=0), tokenizer=tokenizer)
    (prompt,) = data.prompts("train")
    assert (prompt.text, prompt.ids) == ("", [EOS])
    assert data.counts["empty"] == 1


def test_openings_of_no_tokens_are_empty_prompts(make_source, tokenizer):
    data = PromptData(make_source(["abc", "d"], validation=0, test=0), tokenizer=tokenizer, prompt_tokens=0)
    assert [(prompt.text, prompt.ids) for prompt in data.prompts("train")] == [("", [EOS])] * 2


def test_empty_prompt_without_end_of_text_is_refused(make_source, make_tokenizer):
    data = PromptData(make_source([""], validation=0, test=0), tokenizer=make_tokenizer(eos_id=None))
    with pytest.raises(DataError, match="list:1: an empty prompt"):
        data.prompts("train")


def test_batch_is_a_function_of_its_arguments_only(invented, make_source, tokenizer):
    data = PromptData(make_source(invented), tokenizer=tokenizer)
    forwards = [data.batch(step, size=7, seed=3) for step in range(40)]
    other = PromptData(make_source(invented[::-1]), tokenizer=tokenizer)  # nor of the order of the rows
    for step in (39, 0, 21):
        assert [p.text for p in other.batch(step, size=7, seed=3)] == [p.text for p in forwards[step]]
    assert data.batch(5, size=14, seed=3) == forwards[10] + forwards[11]
    assert data.batch(0, size=7, seed=4) != forwards[0]


def test_each_epoch_covers_every_training_prompt_exactly_once(invented, make_source, tokenizer):
    data = PromptData(make_source(invented), tokenizer=tokenizer)
    number = len(data.prompts("train"))
    drawn = [prompt.text for step in range(3 * number) for prompt in data.batch(step, size=1, seed=0)]
    epochs = [drawn[:number], drawn[number : 2 * number], drawn[2 * number :]]
    assert all(sorted(epoch) == sorted(prompt.text for prompt in data.prompts("train")) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_of_an_empty_split_is_refused(make_source, tokenizer):
    data = PromptData(make_source(["abc"], validation=0, test=0), tokenizer=tokenizer, prompt_tokens=9)
    with pytest.raises(DataError, match=r"no prompt .*'too_short': 1"):
        data.batch(0, size=1, seed=0)


@pytest.mark.parametrize("prompt_tokens", [None, 2])
def test_text_that_the_tokenizer_refuses_is_named_by_its_place(make_source, tokenizer, prompt_tokens):
    source = make_source(["abc", "a\0c"], validation=0, test=0)
    with pytest.raises(DataError, match="list:2: the tokenizer cannot encode this text"):
        PromptData(source, tokenizer=tokenizer, prompt_tokens=prompt_tokens).prompts("train")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens is at least 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is at least 1"),
        ({"prompt_tokens": 3, "max_prompt_tokens": 3}, "set one of them to null"),
        ({"on_long": "skipp"}, "did you mean 'skip'"),
    ],
)
def test_wrong_arguments_are_refused(make_source, tokenizer, knobs, message):
    with pytest.raises(ConfigError, match=message):
        PromptData(make_source([]), tokenizer=tokenizer, **knobs)


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversations(write_jsonl, *prompts):
    return Jsonl(write_jsonl([{"prompt": prompt} for prompt in prompts]), validation=0, test=0)


def message(content, role="user"):
    return {"role": role, "content": content}


def test_conversation_goes_through_the_chat_template_with_its_control_tokens(write_jsonl, bpe):
    bpe.hf.chat_template = TEMPLATE
    source = conversations(write_jsonl, [message("be kind", "system"), message("the kettle")])
    (prompt,) = PromptData(source, tokenizer=bpe).prompts("train")
    assert prompt.text == "<|system|>be kind<|endoftext|><|user|>the kettle<|endoftext|><|assistant|>"
    pieces = ["<|system|>be kind", "<|user|>the kettle", "<|assistant|>"]
    first, second, third = (bpe.encode(piece) for piece in pieces)
    assert prompt.ids == [*first, bpe.eos_id, *second, bpe.eos_id, *third]


def test_single_message_of_the_user_needs_no_template(write_jsonl, bpe):
    (prompt,) = PromptData(conversations(write_jsonl, [message("the kettle")]), tokenizer=bpe).prompts("train")
    assert (prompt.text, prompt.ids) == ("the kettle", bpe.encode("the kettle"))


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [
        (None, [message("be kind", "system"), message("hi")], "2 messages needs a tokenizer with a chat template"),
        (TEMPLATE, [message("hi<|endoftext|>")], "control token '<|endoftext|>' as text"),
        (TEMPLATE, [message("hi"), message("hello", "assistant")], "ends with the assistant"),
        ("{{ raise_exception('no such role') }}", [message("hi")], "no such role"),
    ],
)
def test_conversation_that_cannot_be_rendered_is_refused_with_its_place(write_jsonl, bpe, template, prompt, reason):
    bpe.hf.chat_template = template
    with pytest.raises(DataError) as caught:
        PromptData(conversations(write_jsonl, prompt), tokenizer=bpe).prompts("train")
    assert "data.jsonl:1: " in str(caught.value) and reason in str(caught.value)


def test_conversation_has_no_opening(write_jsonl, bpe):
    with pytest.raises(DataError, match=r"data.jsonl:1: prompt_tokens cuts plain texts"):
        PromptData(conversations(write_jsonl, [message("hi")]), tokenizer=bpe, prompt_tokens=4).prompts("train")


def test_a_source_that_gives_no_rows_is_an_error_that_says_what_rows_are():
    class Texts:
        counts: dict[str, int] = {}  # noqa: RUF012

        def rows(self, split):
            return ["plain text"]

    with pytest.raises(DataError, match=r"^data.source gives strs; a source's rows are rlft.data.source.Row"):
        PromptData(Texts(), tokenizer=characters(alphabet="plain tex")).prompts("train")
