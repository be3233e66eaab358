"""Run the tests as on other machines: other kernels, other processors for numba, other numbers of threads, no numba.

    python -m tests.machines                      every setting, a line for each
    python -m tests.machines threads_3 order      these
    python -m tests.machines --commit 8815d29     one, which follows from the commit: CI's

A setting is environment variables and the part of the suite that it touches. What it printed is in
outputs/machines/NAME.log. tests/README.md says which tests compare bits, and why they may.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARITHMETIC = (
    "algos", "core", "cpu", "functional", "learning", "models", "references", "rewards", "rollout", "trainer",
    "verify/test_exact.py", "verify/test_policy.py",
)  # fmt: skip
COMPILED = (
    "cpu", "learning/test_learning.py", "rollout", "trainer/test_fast_paths.py", "trainer/test_resume.py",
)  # fmt: skip
WORKERS = ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal"]  # as in the Makefile
NARROW = "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt"  # a processor without AVX-512
WITHOUT_NUMBA = os.pathsep.join([str(ROOT / "tests" / "without_numba"), os.environ.get("PYTHONPATH", "")])


@dataclass(frozen=True)
class Setting:
    """Environment variables, and files or folders under tests/; a program that fails where they change nothing."""

    variables: dict[str, str]
    parts: tuple[str, ...]
    proof: str = ""


def kernels(capability: str) -> str:
    return f"import torch; assert torch.backends.cpu.get_cpu_capability() == {capability!r}"


def lanes(number: int) -> str:
    return f"from rlft.cpu.kernels import LANES; assert LANES == {number}"


def threads(number: int) -> Setting:
    proof = f"import tests.conftest, torch; assert torch.get_num_threads() == {number}"
    return Setting({"OMP_NUM_THREADS": str(number)}, ARITHMETIC, proof)


SETTINGS = {
    "torch_default": Setting({"ATEN_CPU_CAPABILITY": "default"}, ARITHMETIC, kernels("DEFAULT")),
    "torch_avx2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}, ARITHMETIC, kernels("AVX2")),
    # The first is of Intel's processors, on others without effect; the last changes MKL's kernels everywhere.
    "mkl_avx2": Setting({"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, ARITHMETIC),
    "mkl_compatible": Setting({"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}, ARITHMETIC),
    "numba_avx2": Setting({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": NARROW}, COMPILED, lanes(8)),
    "numba_generic": Setting({"NUMBA_CPU_NAME": "generic"}, COMPILED, lanes(8)),
    "threads_1": threads(1),
    "threads_2": threads(2),
    "threads_3": threads(3),
    "threads_8": threads(8),
    "without_numba": Setting(
        {"PYTHONPATH": WITHOUT_NUMBA}, (*ARITHMETIC, "test_run.py"),
        "from rlft.cpu import compiled; assert not compiled.is_possible()",
    ),
    "order": Setting({"RLFT_TEST_ORDER": str(time.time_ns() // 10**9)}, ("",)),
}  # fmt: skip


def is_right(name: str, setting: Setting) -> bool:
    """Run the setting's tests and print a line."""
    log = ROOT / "outputs" / "machines" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin, environment = time.monotonic(), os.environ | setting.variables
    if setting.proof and subprocess.run([sys.executable, "-c", setting.proof], cwd=ROOT, env=environment).returncode:
        print(f"{name:<14} FAILED: its variables do not do here what they should")
        return False
    parts = [str(Path("tests") / part) for part in setting.parts]
    with log.open("w") as file:
        command = [sys.executable, "-m", "pytest", "-q", *WORKERS, *parts]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    said = " ".join(f"{key}={value}" for key, value in setting.variables.items())
    last = (log.read_text().splitlines() or ["no output"])[-1].strip("= ")
    verdict = "passed" if done.returncode == 0 else f"FAILED, see {log.relative_to(ROOT)}"
    print(f"{name:<14} {verdict} in {time.monotonic() - begin:.0f} s with {said}: {last}", flush=True)
    return done.returncode == 0


def chosen_by(commit: str) -> str:
    """The setting that follows from a commit's hash: CI's, which has the whole suite in a random order anyway."""
    names = [name for name in SETTINGS if name not in ("order", "mkl_avx2")]  # the latter is for Intel's alone
    return names[int(commit[:8], 16) % len(names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SETTING", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--commit", help="take the one setting that follows from this hash")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in SETTINGS]
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(SETTINGS)}")
    names = given.names or list(SETTINGS)
    if given.commit:
        names = [chosen_by(given.commit)]
    return 0 if all([is_right(name, SETTINGS[name]) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
