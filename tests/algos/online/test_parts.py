from __future__ import annotations

import functools
from dataclasses import dataclass

from rlft.algos.online.parts import call, parameters


def weighted(factor: float, rewards: float, mask: float = 1.0, *, power: int = 1) -> float:
    return (factor * rewards * mask) ** power


@dataclass
class Callable:  # which compares by value, and so has no hash
    factor: float

    def __call__(self, rewards: float) -> float:
        return self.factor * rewards


def test_a_part_gets_what_its_signature_names_beside_its_settings() -> None:
    available = {"rewards": 3.0, "mask": 2.0, "values": 7.0}
    assert call(functools.partial(weighted, factor=0.5), **available) == 3.0
    assert call(functools.partial(weighted, 0.5, power=2), **available) == 9.0
    assert call(functools.partial(weighted, factor=0.5, mask=5.0), **available) == 3.0  # what is there goes first
    assert call(Callable(4.0), **available) == 12.0
    assert call(lambda values: values, **available) == 7.0


def test_names_are_those_that_are_left() -> None:
    assert parameters(functools.partial(weighted, factor=0.5)) == {"factor", "rewards", "mask", "power"}
    assert parameters(functools.partial(weighted, 0.5)) == {"rewards", "mask", "power"}
    assert parameters(Callable(1.0)) == {"rewards"}
