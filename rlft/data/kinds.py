"""Checks that algorithm, data set and source fit together, by their classes alone, before anything is loaded.

The class of an algorithm names the kinds of data sets that it reads (`reads`), and the class of a data set its own kind
(`kind`). The class of a source names its columns (`columns`) if they are always the same.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from rlft.core.errors import ConfigError

TABLES = ("csv", "huggingface", "jsonl", "parquet")  # choices of `data/source=` with a user's own columns


class Kind(Enum):
    """What a data set holds, in words, and the choices of `data=` that hold it."""

    PROMPTS = "prompts", "reviews", "shakespeare", "prompts"
    CONTEXTS = "contexts with the tokens that follow", "contexts"
    TEXT = "plain text", "text"
    COMPLETIONS = "prompts with completions", "completions"
    PREFERENCES = "pairs of a chosen and a rejected completion", "preferences"
    UNPAIRED = "completions with a label, desirable or not", "unpaired"
    LABELLED = "texts with a class", "labelled", "reviews_labelled"

    def __init__(self, words: str, *choices: str) -> None:
        self.words, self.choices = words, choices


def check_kind(algorithm: Any, data: Any) -> None:
    """Raise `ConfigError` if the class of an algorithm does not read the kind of data of a data set's class."""
    reads: tuple[Kind, ...] = algorithm.reads
    kind: Kind | None = getattr(data, "kind", None)
    if kind in reads:
        return
    held = f"holds {kind.words}" if kind else f"does not say by `kind` which {Kind.__module__}.Kind it is"
    allowed = ", or ".join(f"{read.words} (data={', '.join(read.choices)})" for read in reads)
    raise ConfigError(f"algo ({algorithm.__name__}) reads {allowed}; data ({data.__name__}) {held}")


def check_columns(settings: dict[str, Any], source: Any) -> None:
    """Raise `ConfigError` if a setting of a data set names a column that the class of its source never has."""
    columns = getattr(source, "columns", None)
    for key, column in settings.items():
        if isinstance(columns, tuple) and key.endswith("_column") and column not in columns:
            has = f"has only {', '.join(columns)}" if columns else "has no column"
            raise ConfigError(
                f"data.{key}={column}: beside its text, data.source ({source.__name__}) {has}; "
                f"data/source={', '.join(TABLES)} have the columns of your files"
            )
