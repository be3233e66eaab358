"""Generated problems with one right answer: sums, sorting letters, and reciting a sentence by heart."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from rlft.core.errors import ConfigError, check_choice
from rlft.core.ranges import CountOrZero, Size
from rlft.core.rng import generator
from rlft.data.source import SPLITS, Row, SplitSource, check_fractions, split_rows

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SENTENCES = ("the quick brown", "fox jumps over a", "lazy dog and ran", "far into the wood")


class Task(SplitSource):
    """A source of problems, split by a hash of the prompt; the column `answer` holds the right completion.

    | kind   | prompt    | answer    | problems                                                           |
    |--------|-----------|-----------|--------------------------------------------------------------------|
    | sums   | "47+5="   | "52"      | all pairs of numbers below `size`                                  |
    | sort   | "qhedka=" | "adehkq"  | `num` drawn problems of `size` letters                             |
    | recite | "1"       | "the qu…" | `size` sentences of 15 to 17 characters, all of them in each split |
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
        """`num` and `seed` are used by sort only. Raises `ConfigError` for a value that is not allowed."""
        check_choice("data.source.kind", kind, _MAKE)
        largest = {"sums": 1000, "sort": len(LETTERS), "recite": len(SENTENCES)}[kind]
        if not 1 <= size <= largest:
            raise ConfigError(f"data.source.size={size} must be between 1 and {largest} for kind={kind}")
        check_fractions(validation, test)
        self.kind, self.size, self.num, self.seed = kind, size, num, seed
        self.validation, self.test = validation, test

    def read_all(self) -> tuple[dict[str, list[Row]], dict[str, int]]:
        problems = _MAKE[self.kind](self.size, self.num, self.seed)
        rows = [Row(prompt, {"answer": answer}, f"{self.kind} {i}") for i, (prompt, answer) in enumerate(problems)]
        if self.kind == "recite":  # learnt by heart: every split has all sentences
            return dict.fromkeys(SPLITS, rows), {"train": len(rows)}
        return split_rows(rows, validation=self.validation, test=self.test)

    @property
    def holds_out(self) -> bool:
        return self.kind == "recite" or self.validation > 0


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
