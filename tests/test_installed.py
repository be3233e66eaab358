"""The wheel: everything that a run needs is in it, and its command works from an empty directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "model=gpt2_scratch", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.n_positions=32",
    "model.tokenizer.vocab_size=260", "data=prompts", "data.source.path=prompts.jsonl", "data.source.validation=0.3",
    "reward=length", "tracker=none", "hardware=cpu", "hardware.num_threads=1", "steps=2", "prompts_per_step=2",
    "group_size=4", "max_new_tokens=4", "eval_prompts=4", "run_dir=run",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    # Without isolation: the backend is installed with the tests, and nothing is downloaded.
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", directory, ROOT]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (made,) = directory.glob("*.whl")
    return made


def test_the_wheel_holds_every_module_yaml_and_asset_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "rlft", "conf"], cwd=ROOT, check=True, capture_output=True, text=True)
    tracked = {f"rlft/{path}" if path.startswith("conf/") else path for path in listed.stdout.splitlines()}
    untracked = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "rlft", "conf"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()  # what is about to be committed
    assert names == tracked | {f"rlft/{p}" if p.startswith("conf/") else p for p in untracked}


def trains_from_an_empty_directory(environment: Path, directory: Path) -> None:
    """Train two steps by the command of an environment, and look at the run by others."""
    directory.mkdir()
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"film {i}"}) + "\n" for i in range(40)))
    # Without numba, an extra of rlft's, which would compile for a quarter of a minute in a new place.
    variables = {"RLFT_CACHE": str(directory / "cache"), "PYTHONPATH": str(ROOT / "tests" / "without_numba")}
    env = os.environ | variables

    def rlft(*arguments: str) -> str:
        command = [str(environment / "bin" / "rlft"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=directory, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert rlft("train", *SETTINGS).splitlines()[-1] == f"rlft: done (steps): {directory / 'run'}"
    summary = json.loads((directory / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["commit"] is None  # the checkout that it was built from is not its own
    assert json.loads(rlft("sample", "run", "--prompt", "film", "--json"))["prompt"] == "film"
    where = [str(environment / "bin" / "python"), "-c", "import rlft; print(rlft.__path__[0])"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=directory, env=env).stdout.strip()
    assert Path(found).is_relative_to(environment)


def test_the_installed_command_trains_from_an_empty_directory(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "-q", "--no-deps", wheel],
        check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    # Its dependencies are those of this environment, behind its own packages.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    trains_from_an_empty_directory(environment, tmp_path / "empty")


@pytest.mark.slow
def test_a_fresh_environment_gets_all_that_the_command_needs(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    # The bound keeps pip from a build of torch for GPUs, which is gigabytes; rlft's own bound admits newer ones.
    install = [environment / "bin" / "python", "-m", "pip", "install", "-q", "torch<2.14", wheel]
    subprocess.run(install, check=True, timeout=1200, capture_output=True)
    trains_from_an_empty_directory(environment, tmp_path / "empty")
