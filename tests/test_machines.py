"""What `make test_machines`, `make test_lowest` and `make test_newest` run is there, and is what they say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.machines import ROOT, SETTINGS, chosen_by
from tests.versions import chosen, requirements


def test_every_part_that_a_setting_touches_exists():
    assert [part for one in SETTINGS.values() for part in one.parts if not (ROOT / "tests" / part).exists()] == []


def test_a_commit_chooses_one_setting_and_commits_choose_all():
    chosen_names = {chosen_by(f"{number:040x}") for number in range(0, 50 << 128, 1 << 128)}
    assert chosen_names == set(SETTINGS) - {
        "order",
        "mkl_avx2",
    }  # CI's whole suite has a random order; MKL's is of Intel's


def test_without_numba_means_without_it_in_every_process():
    program = "import sys; from rlft.cpu import compiled; assert not compiled.is_possible(); import numba"
    environment = os.environ | SETTINGS["without_numba"].variables
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr and "AssertionError" not in done.stderr


@pytest.mark.parametrize(
    "requirement, rule, version",
    [
        ("numpy>=1.26,<3", "lowest", "numpy==1.26"),
        ("numpy>=1.26,<3", "newest", "numpy"),
        ("hydra-core==1.3.2", "lowest", "hydra-core==1.3.2"),
        ("torch>=2.8,<2.14", "lowest", "torch==2.13.0"),  # kept
        ("ray[tune] >= 2, < 3 ; python_version<'3.13'", "lowest", "ray[tune]==2; python_version<'3.13'"),
    ],
)
def test_the_version_of_a_requirement(requirement, rule, version):
    assert chosen(requirement, rule, ["torch==2.13.0", "torchvision==1"]) == version


def test_a_requirement_without_a_lowest_version_is_refused():
    with pytest.raises(SystemExit, match=r"'numpy<3' in pyproject\.toml has no lowest version"):
        chosen("numpy<3", "lowest")


def test_every_requirement_has_a_lowest_version():
    versions = [chosen(requirement, "lowest") for requirement in requirements()]
    assert len(versions) > 20 and all("==" in version for version in versions)
