"""On PYTHONPATH, this makes a process one of an installation without numba (see tests/machines.py)."""

import sys

sys.modules["numba"] = None  # type: ignore[assignment]  # what import and find_spec read as "not there"
