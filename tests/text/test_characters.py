from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlft.core.errors import ConfigError, DataError
from rlft.text.characters import characters


class FakeSource:
    def __init__(self, **splits: list[str]) -> None:
        self.splits = splits

    def rows(self, split: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(text=text, where=f"fake:{n}") for n, text in enumerate(self.splits[split], 1)]


def test_ids_follow_code_points_and_the_end_token_is_last() -> None:
    tokenizer = characters(alphabet="cab")
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (4, 3)
    assert tokenizer.decode([2, 0, 3, 1]) == "cab"


def test_the_alphabet_is_counted_on_the_train_split_only() -> None:
    tokenizer = characters(source=FakeSource(train=["ba", "ab"], validation=["abc"]))
    assert tokenizer.alphabet == "ab"
    with pytest.raises(DataError, match=r"'c' \(U\+0063\)"):
        tokenizer.encode("abc")


def test_unknown_characters_are_named_with_the_text() -> None:
    with pytest.raises(ValueError, match=r"text 1: unknown characters '\\n' \(U\+000A\), 'é' \(U\+00E9\); .* 3 char"):
        characters(alphabet="abc").encode_batch(["abc", "é\na"])


def test_the_fast_path_gives_the_ids_of_the_backend() -> None:
    text = "a\n\n\r\n\t\x00🙂e\u0301\u200f<|endoftext|> "
    tokenizer = characters(alphabet="".join(set(text)))
    backend = tokenizer.hf(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode(text) == backend
    assert len(backend) == len(text)


def test_the_backend_alone_raises_at_an_unknown_character() -> None:
    with pytest.raises(Exception, match="WordLevel"):
        characters(alphabet="abc").hf("abd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either alphabet or source, got neither"),
        ({"alphabet": "ab", "source": FakeSource(train=["a"])}, "got both"),
        ({"alphabet": ""}, "empty"),
        ({"source": FakeSource(train=[""])}, "empty"),
        ({"alphabet": "aba"}, "'a' more than once"),
    ],
)
def test_a_wrong_alphabet_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        characters(**arguments)
