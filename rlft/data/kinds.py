"""The kinds of data sets: an algorithm's class names those that it reads (`reads`), a data set's its own (`kind`)."""

from __future__ import annotations

from enum import Enum
from typing import Any

from rlft.core.errors import ConfigError

_FORMATS = ("jsonl", "csv", "parquet", "huggingface")


class Kind(Enum):
    """What a data set holds, in words, and the choices of `data=` that give it."""

    PROMPTS = "prompts", ("reviews", "shakespeare", "sums", "sort", "recite", *_FORMATS)
    CONTEXTS = "contexts with the tokens that follow", ("shakespeare_contexts", "reviews_contexts")
    TEXT = "plain text", ("reviews_text", "shakespeare_text", "text_file")
    COMPLETIONS = "prompts with completions", ("sums", "sort", *_FORMATS), "completions"
    PREFERENCES = "pairs of a chosen and a rejected completion", _FORMATS, "preferences"
    UNPAIRED = "completions with a label, desirable or not", _FORMATS, "unpaired"
    LABELLED = "texts with a class", ("reviews_labelled", *(f"labelled_{form}" for form in _FORMATS))

    def __init__(self, words: str, names: tuple[str, ...], prefix: str = "") -> None:
        self.words = words
        self.choices = tuple(f"{prefix}_{name}" if prefix else name for name in names)


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
