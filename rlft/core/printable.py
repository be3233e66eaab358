"""Makes text of unknown origin, such as a model's completions, safe to show on a terminal or a page."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape every character that is not printable (`\n`, `\x1b`, `\u202e`), as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
