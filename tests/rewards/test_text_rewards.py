"""The rewards that read text or count tokens, each on values computed by hand."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlft.core.errors import ConfigError
from rlft.rewards.keyword import Keyword
from rlft.rewards.length import Length
from rlft.rewards.phrase_ending import PhraseEnding
from rlft.rewards.repetition import Repetition


def score(reward: Callable, *completions: str) -> list:
    return reward(
        prompts=["p"] * len(completions), completions=list(completions), completion_ids=[[0]] * len(completions)
    )


def score_lengths(reward: Length, *lengths: int) -> list:
    return reward(
        prompts=[""] * len(lengths), completions=[""] * len(lengths), completion_ids=[[7] * n for n in lengths]
    )


class TestSentiment:
    @pytest.fixture(autouse=True)
    def vader(self) -> None:
        pytest.importorskip("vaderSentiment")

    def test_the_compound_is_the_published_formula_of_the_valences(self) -> None:
        from rlft.rewards.sentiment import Sentiment

        good, bad, great = 1.9, -2.5, 3.1  # valences from VADER's lexicon
        expected = [round(s / math.sqrt(s * s + 15), 4) for s in (good, bad, great + great)]
        assert score(Sentiment(), "good", "bad", "great great") == expected == [0.4404, -0.5423, 0.8481]

    def test_a_negative_target_turns_the_sign(self) -> None:
        from rlft.rewards.sentiment import Sentiment

        assert score(Sentiment("negative"), "good", "bad") == [-0.4404, 0.5423]

    def test_binary_is_one_on_the_target_side_of_the_threshold_and_zero_elsewhere(self) -> None:
        from rlft.rewards.sentiment import Sentiment

        assert score(Sentiment(scale="binary"), "good", "the film", "bad") == [1.0, 0.0, 0.0]
        assert score(Sentiment("negative", scale="binary"), "good", "the film", "bad") == [0.0, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("compound", "positive", "negative"), [(0.05, 1, 0), (0.0499, 0, 0), (-0.0499, 0, 0), (-0.05, 0, 1)]
    )
    def test_the_threshold_itself_counts(self, compound: float, positive: int, negative: int) -> None:
        from rlft.rewards.sentiment import Sentiment

        for target, expected in (("positive", positive), ("negative", negative)):
            reward = Sentiment(target, scale="binary")
            reward.analyzer.polarity_scores = lambda text: {"compound": compound}
            assert score(reward, "x") == [expected]

    def test_an_empty_completion_is_neutral_and_never_minus_zero(self) -> None:
        from rlft.rewards.sentiment import Sentiment

        (value,) = score(Sentiment("negative"), "")
        assert math.copysign(1, value) == 1
        assert value == 0

    def test_the_lexicon_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lexicon = pytest.importorskip("vaderSentiment.vaderSentiment")
        from rlft.rewards.sentiment import Sentiment

        reward = Sentiment()
        monkeypatch.delattr(lexicon, "SentimentIntensityAnalyzer")
        assert score(reward, "good", "good") == [0.4404, 0.4404]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"target": "postive"}, r"target='postive'.*positive, negative.*did you mean 'positive'"),
            ({"scale": "grade"}, r"scale='grade'.*graded, binary.*did you mean 'graded'"),
        ],
    )
    def test_a_wrong_argument_is_refused_with_the_nearest_name(self, arguments: dict, message: str) -> None:
        from rlft.rewards.sentiment import Sentiment

        with pytest.raises(ConfigError, match=message):
            Sentiment(**arguments)


def test_sentiment_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlft.rewards.sentiment import Sentiment

    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlft\[sentiment\]'"):
        Sentiment()


class TestKeyword:
    def test_it_is_the_share_of_distinct_keywords_and_repeating_earns_nothing(self) -> None:
        reward = Keyword(["great", "film"])
        assert score(reward, "Great. Great! GREAT", "a great film", "a story") == [0.5, 1.0, 0.0]

    def test_whole_words_stand_alone(self) -> None:
        assert score(Keyword(["art"]), "party", "art_", "(art)", "modern art") == [0, 0, 1, 1]
        assert score(Keyword(["art"], whole_words=False), "party") == [1]

    def test_case_counts_only_where_asked(self) -> None:
        assert score(Keyword(["Great"], case_sensitive=True), "great", "Great") == [0, 1]

    def test_a_keyword_is_text_and_not_a_pattern(self) -> None:
        assert score(Keyword(["a.b", "c++"]), "axb", "a.b and c++") == [0, 1]

    @pytest.mark.parametrize("keywords", ["great", [], ["great", " "], ["great", True], ["great", "Great"]])
    def test_a_wrong_list_is_refused(self, keywords: object) -> None:
        with pytest.raises(ConfigError, match=r"reward\.keyword\.keywords="):
            Keyword(keywords)  # type: ignore[arg-type]

    def test_two_cases_are_two_keywords_where_case_counts(self) -> None:
        assert score(Keyword(["great", "Great"], case_sensitive=True), "great") == [0.5]


class TestPhraseEnding:
    def test_any_of_the_phrases_may_end_the_completion_and_white_space_is_left_aside(self) -> None:
        assert score(PhraseEnding([".", "!"]), "Good.", "Good! \n", "Good", ". Good", "") == [1, 1, 0, 0, 0]

    def test_a_phrase_begins_at_a_word(self) -> None:
        assert score(PhraseEnding(["end"]), "the end", "the weekend", "End") == [1, 0, 1]

    def test_a_mark_is_not_a_pattern(self) -> None:
        assert score(PhraseEnding(["."]), "Good") == [0]

    def test_case_counts_only_where_asked(self) -> None:
        assert score(PhraseEnding(["The End"], case_sensitive=True), "the end", "The End") == [0, 1]

    @pytest.mark.parametrize("phrases", [".", [], [""], [None]])
    def test_a_wrong_list_is_refused(self, phrases: object) -> None:
        with pytest.raises(ConfigError, match=r"reward\.phrase_ending\.phrases="):
            PhraseEnding(phrases)  # type: ignore[arg-type]


class TestLength:
    def test_it_is_zero_in_the_band_and_falls_by_the_slope_outside(self) -> None:
        reward = Length(min_tokens=3, max_tokens=5, slope=0.5)
        assert score_lengths(reward, 0, 2, 3, 5, 6, 9) == [-1.5, -0.5, 0, 0, -0.5, -2.0]

    def test_without_an_upper_end_long_completions_cost_nothing(self) -> None:
        assert score_lengths(Length(min_tokens=3, slope=1.0), 1, 3, 10_000) == [-2, 0, 0]

    def test_it_counts_tokens_and_not_words(self) -> None:
        reward = Length(min_tokens=2, slope=1.0)
        assert reward(prompts=[""], completions=["five words are in here"], completion_ids=[[1]]) == [-1.0]

    def test_one_more_token_towards_the_band_is_always_worth_the_slope(self) -> None:
        values = score_lengths(Length(min_tokens=10, slope=0.25), *range(11))
        assert [b - a for a, b in itertools.pairwise(values)] == [0.25] * 10

    @pytest.mark.parametrize(
        ("arguments", "key"),
        [
            ({}, "min_tokens=0"),
            ({"min_tokens": -1}, "min_tokens=-1"),
            ({"min_tokens": 2.5}, "min_tokens=2.5"),
            ({"min_tokens": True}, "min_tokens=True"),
            ({"min_tokens": 8, "max_tokens": 7}, "max_tokens=7"),
            ({"max_tokens": "9"}, "max_tokens='9'"),
            ({"min_tokens": 1, "slope": 0}, "slope=0"),
            ({"min_tokens": 1, "slope": -1.0}, "slope=-1.0"),
            ({"min_tokens": 1, "slope": math.nan}, "slope=nan"),
            ({"min_tokens": 1, "slope": math.inf}, "slope=inf"),
        ],
    )
    def test_a_wrong_argument_is_refused(self, arguments: dict, key: str) -> None:
        with pytest.raises(ConfigError, match=key):
            Length(**arguments)


class TestRepetition:
    def test_it_is_minus_the_share_of_repeated_ngrams(self) -> None:
        # a b, b a, a b, b a, a b: 2 of 5 are distinct
        assert score(Repetition(2), "a b a b a b") == [-3 / 5]
        assert score(Repetition(1), "a b a b a b") == [-4 / 6]
        assert score(Repetition(3), "a b a b a b") == [-2 / 4]

    def test_case_spaces_and_apostrophes_do_not_pass_for_variety(self) -> None:
        assert score(Repetition(1), "great Great\nGREAT", "didn't DIDN'T") == [-2 / 3, -1 / 2]
        assert score(Repetition(1), "it's what she's", "it’s what she’s") == [
            0,
            0,
        ]  # an apostrophe within a word is not a mark

    def test_repeated_marks_are_repetition(self) -> None:
        assert score(Repetition(1), "!!!!") == [-3 / 4]
        assert score(Repetition(2), "!!!!") == [-2 / 3]

    def test_nothing_to_repeat_costs_nothing(self) -> None:
        values = score(Repetition(2), "", "word", "two words", "all of these are different")
        assert values == [0, 0, 0, 0]
        assert all(math.copysign(1, value) == 1 for value in values)

    def test_a_loop_costs_more_than_prose(self) -> None:
        loop = "a great film and a great film and a great film and a great film"
        prose = "a great film that takes its time and knows what it wants to say"
        looped, plain = score(Repetition(), loop, prose)
        assert looped == pytest.approx(-10 / 14)  # 14 bigrams; four differ: a great, great film, film and, and a
        assert plain == 0

    @given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
    def test_it_equals_a_count_with_a_loop(self, words: list[str], n: int) -> None:
        seen: list[list[str]] = []
        repeated = total = 0
        for start in range(len(words) - n + 1):
            ngram = words[start : start + n]
            total += 1
            repeated += ngram in seen
            seen.append(ngram)
        expected = -repeated / total if total else 0.0
        assert score(Repetition(n), " ".join(words)) == [pytest.approx(expected, abs=1e-15)]

    @pytest.mark.parametrize("ngram", [0, -1, 1.5, True, "2"])
    def test_a_wrong_size_is_refused(self, ngram: object) -> None:
        with pytest.raises(ConfigError, match=r"reward\.repetition\.ngram="):
            Repetition(ngram)  # type: ignore[arg-type]
