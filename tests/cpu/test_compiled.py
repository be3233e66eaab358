from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from rlft.cpu import compiled
from rlft.cpu.compiled import exp


def digest() -> str:
    """Of what the decode loop draws behind a prefill, which is torch's, by one thread."""
    from tests.cpu import test_decode

    torch.set_num_threads(1)
    drawn = test_decode.decoded(test_decode.policy_of())
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in drawn)).hexdigest()


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


@pytest.fixture(params=["OpenMP's threads", "others"])
def three_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "others":
        monkeypatch.setattr(compiled, "_openmp", lambda: None)
    elif compiled._openmp() is None:
        pytest.skip("torch has no OpenMP here that could be called")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_tasks_run_once_each_on_as_many_threads_as_torch_has(three_threads: None) -> None:
    begun, done = threading.Barrier(3, timeout=60), []

    def task(number: int) -> None:
        if number < 3:
            begun.wait()  # raises if the first three do not run at once
        done.append((number, threading.get_native_id()))

    compiled.in_threads(partial(task, number) for number in range(20))
    assert sorted(number for number, _ in done) == list(range(20))
    assert len({thread for _, thread in done}) == 3
    assert threading.get_native_id() in {thread for _, thread in done}


def test_an_error_in_a_task_ends_the_others_and_is_raised(three_threads: None) -> None:
    done: list[int] = []

    def task(number: int) -> None:
        if number == 4:
            raise ZeroDivisionError("of a task")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(ZeroDivisionError, match="of a task"):
        compiled.in_threads(partial(task, number) for number in range(1000))
    assert len(done) < 50
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count  # nothing goes on behind the caller's back
    compiled.in_threads([partial(task, 1), partial(task, 2)])


def test_a_signals_exception_is_raised(three_threads: None) -> None:
    def interrupt(*_: object) -> None:
        raise ZeroDivisionError("of a signal")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(ZeroDivisionError, match="of a signal"):
            compiled.in_threads(partial(time.sleep, 0.01) for _ in range(1000))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signals_exception_before_anything_could_begin_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes prints what a callback raises, and goes on."""
    monkeypatch.setattr(compiled, "_openmp", lambda: lambda *_: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(KeyboardInterrupt):
        compiled.in_threads([lambda: None] * 3)


def test_a_forked_process_has_threads_of_its_own(three_threads: None) -> None:
    """OpenMP's would be waited for, and are not there."""
    compiled.in_threads([lambda: None] * 3)
    child, done = os.fork(), list[int]()
    if child == 0:
        try:
            compiled.in_threads(partial(done.append, number) for number in range(6))
        finally:
            os._exit(0 if sorted(done) == list(range(6)) else 1)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == (child, 0)


def test_bits_do_not_depend_on_who_compiled(tmp_path) -> None:
    """They would change where a run is resumed by another process than the one that compiled for it."""
    pytest.importorskip("numba")
    drawn = {digest()}  # compiled here, or read from the cache that whoever compiled first left beside the source
    command = [sys.executable, "-c", "from tests.cpu.test_compiled import digest; print(digest())"]
    for _ in range(2):  # compiled with sets in another order; read from that one's cache
        variables = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "3"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
        drawn.add(done.stdout.strip())
    assert len(drawn) == 1


def test_code_from_before_a_change_of_what_it_calls_is_compiled_again(tmp_path) -> None:
    pytest.importorskip("numba")
    program = "import torch; from rlft.cpu import gelu; gelu.gelu(torch.zeros(gelu.MIN_SIZE)); "
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
    program = "import called, calling; from rlft.cpu import compiled; "
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


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_decode.py", "test_attention.py"])
def test_vectors_of_eight_give_the_same(file: str, tmp_path: Path) -> None:
    """As on a processor without AVX-512: a file of tests, compiled for one."""
    pytest.importorskip("numba")
    from llvmlite import binding

    if not binding.get_host_cpu_features().get("avx512f", False):
        pytest.skip("vectors have eight entries here")
    narrow = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt"}
    environment = os.environ | narrow | {"NUMBA_CACHE_DIR": str(tmp_path)}
    program = "from rlft.cpu.kernels import LANES; import pytest; assert LANES == 8; "
    program += f"raise SystemExit(pytest.main(['-q', {str(Path(__file__).parent / file)!r}]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
