"""Memory as large matrix products want it: in huge pages, and kept by the process from one step to the next.

A step allocates and frees the same large tensors again and again. glibc gives each back to the system, which clears
new pages for the next one, in pieces of 4 KiB that the processor then looks up one by one. glibc reads these settings
when a process starts, and so the process starts once more.
"""

from __future__ import annotations

import os
import platform
import sys

TUNABLES = {
    "glibc.malloc.hugetlb": 1,  # ask for transparent huge pages
    "glibc.malloc.mmap_max": 0,  # large tensors come from the heap, which stays
    "glibc.malloc.trim_threshold": 2**46,  # and never shrinks
}
VARIABLE = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Start this process's command again under `TUNABLES`, once; whoever sets GLIBC_TUNABLES is left alone.

    Does nothing where the C library is another one, or where another program runs this one as a part of itself. Call it
    first: what the process has done so far is done again.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_command = (sys.argv[0] if spec is None else spec.name.removesuffix(".__main__")) in sys.orig_argv
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or VARIABLE in os.environ or not is_command:
        return
    settings = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    os.execve(sys.executable, sys.orig_argv, os.environ | {VARIABLE: settings})
