"""The LLVM code of `rlft/cpu/kernels.py`: the files beside this one test what it computes."""

from __future__ import annotations

import ast
from pathlib import Path

import rlft

SOURCE = Path(rlft.__file__).parent / "cpu" / "kernels.py"


def test_no_pointer_says_to_what_it_points() -> None:
    """llvmlite gives up pointers with a type: then only the reader of a pointer can say what is read."""
    tree = ast.parse(SOURCE.read_text())
    assert not [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("as_pointer", "pointee", "bitcast")
    ]
    needed = {"load": "typ", "load_atomic": "typ", "gep": "source_etype"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    found = [call for call in calls if call.func.attr in needed]
    assert {call.func.attr for call in found} == needed.keys()
    assert [call.lineno for call in found if needed[call.func.attr] not in {k.arg for k in call.keywords}] == []
