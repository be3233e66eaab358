"""Settings of glibc's allocator that make large tensors faster: huge pages, kept from one step to the next.

A step allocates and frees the same large tensors again and again. By default glibc returns each one to the system,
which clears new pages of 4 KiB for the next one, and the processor looks these up one by one. glibc reads its settings
when a process starts, so the process has to start a second time.
"""

from __future__ import annotations

import os
import platform
import sys

TUNABLES = {
    "glibc.malloc.hugetlb": 1,  # ask for transparent huge pages
    "glibc.malloc.mmap_max": 0,  # take large tensors from the heap, which is kept
    "glibc.malloc.trim_threshold": 2**46,  # never shrink the heap
}
VARIABLE = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Start this process's command once more under `TUNABLES`, unless GLIBC_TUNABLES is set already.

    Does nothing with another C library, or where this is not the main program. Call it first: the process repeats
    whatever it has done so far.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_command = (sys.argv[0] if spec is None else spec.name.removesuffix(".__main__")) in sys.orig_argv
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or VARIABLE in os.environ or not is_command:
        return
    settings = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    os.execve(sys.executable, sys.orig_argv, os.environ | {VARIABLE: settings})
