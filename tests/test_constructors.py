"""No constructor of rlft takes more than a dozen arguments, and no long call is hidden from the formatter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rlft").rglob("*.py"))
MOST = 12
EXEMPT = {
    "RootSettings", "RootConfig",  # which hold every root setting
    "State",  # the arrays of a loop that numba compiles: it takes tuples, and no other object
}  # fmt: skip
LONG = ", ".join(f"a{i}: int" for i in range(13))
FIELDS = "\n".join(f"    a{i}: int" for i in range(13))


def classes(source: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}


ALL = {name: node for file in FILES for name, node in classes(file.read_text(encoding="utf-8")).items()}


def is_made_of_fields(node: ast.ClassDef) -> bool:
    """Whether a dataclass or a named tuple."""
    named = [*node.decorator_list, *node.bases]
    return any(word in ast.unparse(one) for one in named for word in ("dataclass", "NamedTuple"))


def fields(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> set[str]:
    """The fields that a dataclass's constructor takes, those of its bases among them."""
    found: set[str] = set()
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in known and is_made_of_fields(known[base.id]):
            found |= fields(known[base.id], known)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"):
            is_given = line.value is None or "init=False" not in ast.unparse(line.value)
            found |= {ast.unparse(line.target)} if is_given else set()
    return found


def num_arguments(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> int:
    """How many arguments the constructor that is written in a class takes beside self; 0 where none is."""
    for line in node.body:
        if isinstance(line, ast.FunctionDef) and line.name == "__init__":
            given = line.args
            return len([*given.posonlyargs, *given.args, *given.kwonlyargs]) - 1
    return len(fields(node, known)) if is_made_of_fields(node) else 0


def hidden_calls(source: str) -> Iterator[str]:
    """Calls of more arguments than that in statements that the formatter is told to skip."""
    lines = source.splitlines()
    for statement in ast.walk(ast.parse(source)):
        is_simple = isinstance(statement, ast.stmt) and not hasattr(statement, "body")
        if is_simple and "# fmt: skip" in lines[(statement.end_lineno or 1) - 1]:
            for call in ast.walk(statement):
                if isinstance(call, ast.Call) and len(call.args) + len(call.keywords) > MOST:
                    yield f"line {call.lineno}: {ast.unparse(call.func)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_constructor_takes_more_than_a_dozen_arguments(file):
    found = classes(file.read_text(encoding="utf-8"))
    counts = {name: num_arguments(node, ALL) for name, node in found.items() if name not in EXEMPT}
    assert {name: count for name, count in counts.items() if count > MOST} == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_call_of_more_than_a_dozen_arguments_is_hidden_from_the_formatter(file):
    assert list(hidden_calls(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        f"class A:\n    def __init__(self, {LONG}) -> None: ...",
        f"class A:\n    def __init__(self, *, {LONG}) -> None: ...",
        f"@dataclass(frozen=True)\nclass A:\n{FIELDS}",
        f"@dataclass\nclass Base:\n{FIELDS}\n@dataclass\nclass A(Base):\n    more: int",
        f"class A(NamedTuple):\n{FIELDS}",
    ],
)
def test_a_longer_constructor_would_be_seen(source):
    found = classes(source)
    assert num_arguments(found["A"], found) in (13, 14)


@pytest.mark.parametrize(
    "source",
    [
        f"class A:\n{FIELDS}\n    def __init__(self, x: int) -> None: ...",  # annotations of what it sets itself
        f"class A(Protocol):\n{FIELDS}",
        "@dataclass\nclass A:\n    names: ClassVar[tuple]\n    made: int = field(init=False)\n    given: int = 0",
    ],
)
def test_what_is_no_argument_is_not_counted(source):
    found = classes(source)
    assert num_arguments(found["A"], found) <= 1


def test_a_longer_call_that_the_formatter_skips_would_be_seen():
    arguments = ", ".join(f"a{i}={i}" for i in range(13))
    for call in (f"x = A({arguments})", f"return_(g(A(\n    {arguments},\n)))"):
        assert list(hidden_calls(f"{call}  # fmt: skip")) == ["line 1: A"]
        assert list(hidden_calls(call)) == []  # which the formatter writes one argument a line
    assert list(hidden_calls("x = A(1, 2)  # fmt: skip")) == []
