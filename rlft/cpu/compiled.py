"""How rlft's numba code is compiled and run in threads, and the functions that all of it calls.

numba is an optional dependency (the extra `fast`) and slow to import, so it is imported only when something is
compiled. Compiled code is kept beside the source, for the next process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

f32 = np.float32  # wraps literals in compiled code: Python's own would turn the arithmetic into float64
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()  # a process that is forked from this one does not have OpenMP's threads
_LOCK = threading.Lock()  # compiling may be called from several threads: a reward model runs in one of its own


class _Flags(set[str]):
    """Flags in a fixed order. numba writes them into names, names decide what LLVM inlines, and that decides bits."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))

    def __repr__(self) -> str:  # from Python 3.13.3 on, a set's own repr does not go through `__iter__`
        return f"_Flags({{{', '.join(map(repr, self))}}})"

    def copy(self) -> _Flags:
        return _Flags(self)


def options(*flags: str) -> dict[str, Any]:
    """Return numba's options; `flags` are LLVM's fast-math flags."""
    return {"error_model": "numpy", "fastmath": _Flags(flags)}


@functools.cache
def is_possible() -> bool:
    return importlib.util.find_spec("numba") is not None


def function(
    python: Callable[..., Any], options: dict[str, Any], *, calls: tuple[Any, ...] = (), apart: tuple[Any, ...] = ()
) -> Callable[..., Any]:
    """Return a function compiled for the types of each call, which runs without the interpreter's lock.

    `calls` are the functions that it calls, and are inlined. If they were called, the process that compiled them would
    run another copy than one that reads them from the cache, and copies may round differently. Functions in `apart` are
    not inlined, and so compiled once instead of once for each call: their arithmetic is in kernels, which fix each
    operation (`rlft.cpu.kernels`).
    """
    from numba import njit
    from numba.extending import register_jitable

    with _LOCK:
        _share()
        for called in (*calls, *apart):
            register_jitable(forceinline=called in calls, **options)(called)
    made = njit(nogil=True, cache=True, **options)(python)
    # numba compiles again when the function's own file has changed; it must also when a file of what it calls has.
    files = {Path(part.__code__.co_filename) for part in (*calls, *apart)}
    changed = max(file.stat().st_mtime for file in {*files, Path(__file__), Path(__file__).with_name("kernels.py")})
    for index in Path(made.stats.cache_path).glob(f"*.{python.__name__}-*.nbi"):
        if index.stat().st_mtime < changed:
            index.unlink(missing_ok=True)
    return made


def in_threads(tasks: Iterable[Callable[[], None]]) -> None:
    """Run tasks on at most as many threads as torch has, this one included; a thread takes one task after another.

    Where torch uses OpenMP, its own threads are taken: after each operation they keep their processors busy for a while
    so that the next can begin at once, and other threads would have to share the processors with them.
    """
    waiting, began, errors = deque(tasks), deque[int](), deque[BaseException]()

    def work(_: int | None = None) -> None:
        try:
            began.append(threading.get_ident())
            while waiting:
                try:
                    task = waiting.popleft()
                except IndexError:  # another thread took the last
                    return
                task()
        except BaseException as error:
            errors.append(error)
            waiting.clear()  # begin no more tasks; those that run write into the caller's arrays

    threads = torch.get_num_threads() if len(waiting) > 1 else 1
    if threads > 1 and os.getpid() == _PROCESS and (parallel := _openmp()) is not None:
        parallel(_CALLBACK(work), None, threads, 0)  # all of torch's threads: a smaller team would end some
        if threading.get_ident() not in began:  # a signal raised an exception before `work` could catch it
            raise KeyboardInterrupt
    else:
        others = [_pool(threads, os.getpid()).submit(work) for _ in range(min(threads, len(waiting)) - 1)]
        work()
        wait(others)
    if errors:
        raise errors[0]


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """Return GOMP_parallel(function, data, threads, flags) of the library whose threads torch uses."""
    with contextlib.suppress(OSError, AttributeError, IndexError):
        loaded = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
        found = sorted({path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))})
        own = [path for path in found if str(Path(torch.__file__).parent) in map(str, Path(path).parents)]
        library = (own or found)[0]
        parallel = ctypes.CDLL(library).GOMP_parallel
        parallel.argtypes, parallel.restype = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return parallel
    return None


def precompile(function: Any, *arguments: Any) -> None:
    """Compile a function for arguments of these types before its first call."""
    from numba import typeof

    function.compile(tuple(map(typeof, arguments)))


def in_team(tasks: Sequence[Callable[[], None]], *, stop: Callable[[], None]) -> None:
    """Run tasks that wait for each other, each in a thread of its own, while this thread can receive signals.

    `stop` is called where a signal raises an exception, and must end the tasks. Either all tasks begin or none.
    """
    start = threading.Barrier(len(tasks))

    def begin(task: Callable[[], None]) -> None:
        start.wait()
        task()

    pool, lock = _team(len(tasks), os.getpid())
    with lock:
        members: list[Future[None]] = []
        try:
            for task in tasks:
                members.append(pool.submit(begin, task))
            wait(members)
        except BaseException:
            start.abort()
            stop()
            wait(members)
            raise
    for member in members:
        member.result()


@functools.cache
def _team(size: int, process: int) -> tuple[ThreadPoolExecutor, threading.Lock]:
    """Return a pool and its lock: two teams at once could each hold threads that the other waits for."""
    return ThreadPoolExecutor(size), threading.Lock()


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return a pool that is kept, as starting a thread takes a millisecond; a forked process needs its own."""
    return ThreadPoolExecutor(max(1, threads - 1))


@functools.cache
def _share() -> None:
    from numba.extending import register_jitable

    for shared in (exp, sigmoid_2u):  # without reordering, which would undo the rounding in exp
        register_jitable(forceinline=True, **options("contract"))(shared)


def sigmoid_2u(x):
    """Return 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): tanh GELU's factor of x."""
    return f32(1) / (f32(1) + exp(f32(-1.5957691216057308) * (x + f32(0.044715) * x * x * x)))


def exp(x):
    """Return exp(x), 0 below -87 and infinity above 88: 2^k exp(r), |r| <= log(2) / 2, as in Cephes' expf.

    A call of the C library's exp would not be vectorised.
    """
    bounded = f32(88) if x > f32(88) else x
    shifted = bounded * f32(1.4426950408889634) + f32(12582912)  # 1.5 * 2^23 leaves k in the last bits
    k = shifted - f32(12582912)
    r = bounded - k * f32(0.693359375) - k * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4) * r + f32(1.3981999507e-3)
    p = (p * r + f32(8.3334519073e-3)) * r + f32(4.1665795894e-2)
    p = (p * r + f32(1.6666665459e-1)) * r + f32(5.0000001201e-1)
    power = np.int32((f32(shifted).view(np.int32) + 127) << 23).view(f32)  # 2^k: k moves to the exponent's bits
    value = f32(0) if x < f32(-87) else (p * r * r + r + f32(1)) * power
    return f32(np.inf) if x > f32(88) else value
