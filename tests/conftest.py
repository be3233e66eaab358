"""What every test runs under: the threads, the order, and nothing left behind by the test before.

Environment variables set it, so that processes which tests start have the same; `python -m tests.machines` is a list.

    OMP_NUM_THREADS   torch's threads, 1 by default: the suite's models are tiny, and threads that wait for each other
                      cost ten times the work they share. A test that says its own number has it whatever this is
    OMP_WAIT_POLICY   passive by default: threads that wait sleep, and leave the processor to other workers' tests
    RLFT_TEST_ORDER   a seed: files, and tests within them, come in a random order
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads them
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # a slow one, or one that is shared, is no fault of an example

THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.hookimpl(tryfirst=True)  # pytest then joins the tests of a parametrized fixture again
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if seed := os.environ.get("RLFT_TEST_ORDER"):
        rank = {item: random.Random(f"{seed} {item.nodeid}").random() for item in items}
        files = {item: random.Random(f"{seed} {item.path.name}").random() for item in items}
        items.sort(key=lambda item: (files[item], rank[item]))
