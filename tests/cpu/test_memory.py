from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rlft.cpu.memory import TUNABLES, VARIABLE

SCRIPT = """
import os, sys
from rlft.cpu.memory import restart_with_huge_pages
print("start", os.getpid())
sys.stdout.flush()
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def lines(**changed: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | changed
    command = [sys.executable, "-c", SCRIPT, "a b", "--c"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@glibc
def test_the_same_command_starts_once_more_in_the_same_process() -> None:
    first, second, last = lines()
    assert first == second
    assert last.endswith("['a b', '--c']")
    assert all(f"{name}={value}" in last for name, value in TUNABLES.items())


def test_a_program_that_runs_the_command_in_itself_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(SCRIPT.replace("sys.argv[1:]", "__name__"))
    whole = f"import runpy; runpy.run_path({str(tmp_path / 'part.py')!r}, run_name='__main__')"
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    made = subprocess.run([sys.executable, "-c", whole], env=environment, capture_output=True, text=True, check=True)
    first, last = made.stdout.splitlines()
    assert first.startswith("start")
    assert last == "None __main__"


def test_settings_of_the_users_own_are_left_alone() -> None:
    _, last = lines(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert last == "glibc.malloc.check=0 ['a b', '--c']"
