"""Generated tasks with one right answer: sums, sorting, and reciting a sentence by heart."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from rlft.core.errors import ConfigError, nearest
from rlft.core.ranges import CountOrZero, Size
from rlft.core.rng import generator
from rlft.data.source import Row, check_fractions, check_split, split_rows

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SENTENCES = ("the quick brown", "fox jumps over a", "lazy dog and ran", "far into the wood")


class Task:
    """A source of problems: the text is the prompt, column `answer` what should follow; split by a hash of the prompt.

    | kind   | size | prompt            | answer             |
    |--------|------|-------------------|--------------------|
    | sums   | 100  | "47+5="           | "52", of numbers below `size` |
    | sort   | 6    | "qhedka=" | "adehkq", of `size` letters; `num` problems are drawn |
    | recite | 4    | "1" … | a sentence of 15 to 17 letters; `size` of them, all in every split |
    """

    columns = ("answer",)

    def __init__(
        self,
        *,
        kind: str,
        size: Size,
        num: Size = 20_000,
        validation: float = 0.05,
        test: float = 0.05,
        seed: CountOrZero = 0,
    ) -> None:
        """`num` and `seed` are for drawn problems (sort). Raises `ConfigError` for what is not allowed."""
        if kind not in _MAKE:
            raise ConfigError(f"data.source.kind={kind} is not one of {', '.join(_MAKE)}{nearest(kind, _MAKE)}")
        largest = {"sums": 1000, "sort": len(LETTERS), "recite": len(SENTENCES)}[kind]
        if not 1 <= size <= largest:
            raise ConfigError(f"data.source.size={size} must be between 1 and {largest} for kind={kind}")
        check_fractions(validation, test)
        problems = _MAKE[kind](size, num, seed)
        rows = [Row(prompt, {"answer": answer}, f"{kind} {i}") for i, (prompt, answer) in enumerate(problems)]
        if kind == "recite":  # by heart: there is nothing to generalise to
            self._rows, self._counts = dict.fromkeys(("train", "validation", "test"), rows), {"train": len(rows)}
        else:
            self._rows, self._counts = split_rows(rows, validation=validation, test=test)
        self.holds_out = kind == "recite" or validation > 0

    @property
    def counts(self) -> dict[str, int]:
        return self._counts

    def rows(self, split: str) -> list[Row]:
        return self._rows[check_split(split)]


def _sums(size: int, num: int, seed: int) -> list[tuple[str, str]]:
    return [(f"{a}+{b}=", str(a + b)) for a, b in itertools.product(range(size), repeat=2)]


def _sort(size: int, num: int, seed: int) -> list[tuple[str, str]]:
    draws = generator(seed, "task sort").integers(len(LETTERS), size=(num, size))
    return [
        ("".join(LETTERS[i] for i in row) + "=", "".join(LETTERS[i] for i in sorted(row))) for row in draws.tolist()
    ]


def _recite(size: int, num: int, seed: int) -> list[tuple[str, str]]:
    return [(str(i + 1), sentence) for i, sentence in enumerate(SENTENCES[:size])]


_MAKE: dict[str, Callable[[int, int, int], list[tuple[str, str]]]] = {"sums": _sums, "sort": _sort, "recite": _recite}
