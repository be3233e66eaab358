from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from rlft import compiled
from rlft.compiled import exp

DECODE = """
import hashlib
from tests.rollout import test_loop
drawn = test_loop.decoded(test_loop.policy_of())
print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in drawn)).hexdigest())
"""


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 88, 4001, dtype=np.float32)
    want = np.exp(x.astype(np.float64))
    got = np.array([exp(v) for v in x], dtype=np.float64)
    assert (np.abs(got - want) <= 2 * np.spacing(want.astype(np.float32))).all()
    assert exp(np.float32(-87.5)) == 0
    assert np.isnan(exp(np.float32(np.nan)))


def test_flags_have_one_order_in_names_and_copies() -> None:
    flags = compiled.options("reassoc", "contract", "nsz", "arcp")["fastmath"]
    for same in (flags, flags.copy()):
        assert str(same) == "_Flags({'arcp', 'contract', 'nsz', 'reassoc'})"


def test_bits_do_not_depend_on_who_compiled(tmp_path) -> None:
    """They would change where a run is resumed by another process than the one that compiled for it."""
    pytest.importorskip("numba")
    drawn = []
    for seed in ("1", "1", "3"):  # compiled, read from the cache, compiled with sets in another order
        variables = {"NUMBA_CACHE_DIR": str(tmp_path / seed), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", DECODE]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
        drawn.append(done.stdout.strip())
    assert len(set(drawn)) == 1


def test_code_from_before_a_change_of_what_it_calls_is_compiled_again(tmp_path) -> None:
    pytest.importorskip("numba")
    program = "import torch; from rlft.models import gelu; gelu.gelu(torch.zeros(gelu.MIN_SIZE)); "
    program += "print(sum(gelu._compiled()[0].stats.cache_hits.values()))"

    def hits() -> int:
        command, variables = [sys.executable, "-c", program], {"NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
        return int(done.stdout)

    assert [hits(), hits()] == [0, 1]
    for index in tmp_path.rglob("*.nbi"):
        os.utime(index, (0, 0))
    assert hits() == 0


def test_code_from_before_a_change_in_a_file_of_what_it_calls_is_compiled_again(tmp_path) -> None:
    pytest.importorskip("numba")
    called = tmp_path / "called.py"
    called.write_text("def double(x):\n    return x + x\n")
    (tmp_path / "calling.py").write_text("from called import double\n\ndef four(x):\n    return double(double(x))\n")
    program = "import called, calling; from rlft import compiled; "
    program += "f = compiled.function(calling.four, compiled.options(), calls=(called.double,)); "
    program += "print(f(1.0), sum(f.stats.cache_hits.values()))"

    def run() -> str:
        variables = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables).stdout

    assert [run(), run()] == ["4.0 0\n", "4.0 1\n"]
    called.write_text("def double(x):\n    return 2.5 * x\n")
    os.utime(called, (time.time() + 10, time.time() + 10))
    assert run() == "6.25 0\n"
