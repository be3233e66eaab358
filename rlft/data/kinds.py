"""What goes together: the kinds of data sets that an algorithm reads, and the columns of a source that a set reads.

An algorithm's class names the kinds that it reads (`reads`), a data set's its own (`kind`). A source whose columns are
always the same names them (`columns`).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from rlft.core.errors import ConfigError

TABLES = ("csv", "huggingface", "jsonl", "parquet")  # the choices of `data/source=` whose columns are the user's


class Kind(Enum):
    """What a data set holds, in words, and the choices of `data=` that give it."""

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
    """Raise `ConfigError` where a data set's class is of no kind that an algorithm's class reads.

    It needs the classes only, so that it can be asked before anything is loaded.
    """
    reads: tuple[Kind, ...] = algorithm.reads
    kind: Kind | None = getattr(data, "kind", None)
    if kind in reads:
        return
    held = f"holds {kind.words}" if kind else f"does not say by `kind` which {Kind.__module__}.Kind it is"
    allowed = ", or ".join(f"{read.words} (data={', '.join(read.choices)})" for read in reads)
    raise ConfigError(f"algo ({algorithm.__name__}) reads {allowed}; data ({data.__name__}) {held}")


def check_columns(settings: dict[str, Any], source: Any) -> None:
    """Raise `ConfigError` where a setting of a data set names a column that its source's class never has."""
    columns = getattr(source, "columns", None)
    for key, column in settings.items():
        if isinstance(columns, tuple) and key.endswith("_column") and column not in columns:
            has = f"has only {', '.join(columns)}" if columns else "has no column"
            raise ConfigError(
                f"data.{key}={column}: beside its text, data.source ({source.__name__}) {has}; "
                f"data/source={', '.join(TABLES)} have the columns of your files"
            )
