"""What takes long to import is imported by what needs it, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "accelerate", "httpx", "httpx2", "jinja2", "huggingface_hub", "numba", "llvmlite", "datasets",
         "pandas", "matplotlib", "tiktoken", "requests")  # fmt: skip
PROGRAM = """
import importlib, pkgutil, sys
import rlft.data, rlft.rewards, rlft.text
rooms = [f"{room.__name__}.{module.name}" for room in (rlft.data, rlft.rewards, rlft.text)
         for module in pkgutil.iter_modules(room.__path__)]
assert len(rooms) > 20, rooms
heavy = sys.argv[1:]
for name in [*rooms, "rlft.models.base", "rlft.models.gpt2", "rlft.references.frozen", "rlft.rollout.engine"]:
    importlib.import_module(name)
    found = [module for module in heavy if module in sys.modules]
    assert not found, f"importing {name} imports {found}"

from rlft.text.characters import characters
from rlft.text.huggingface import huggingface
for tokenizer in (huggingface("package:rlft/assets/tiny"), characters(alphabet="a film")):
    assert tokenizer.decode(tokenizer.encode("a film")) == "a film"
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 and len(tokenizer.fingerprint) == 64
    found = [module for module in heavy if module in sys.modules]
    assert not found, f"a tokenizer imports {found}"
"""


def test_nothing_heavy_is_imported_by_data_rewards_models_or_the_tokenizer_of_tiny() -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *HEAVY], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr.splitlines()[-1]
