"""Run the default suite with the lowest versions that pyproject.toml allows, or with the newest on the index.

    python -m tests.versions lowest                           in a new environment, .venv-lowest
    python -m tests.versions newest --keep torch==2.13.0      with this version of that whatever the rule says

Direct dependencies follow the rule, those of all extras among them; theirs are what pip finds. `--keep` is for a
machine that has one build of a package: torch's on the index bring gigabytes for GPUs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence

from tests.machines import ROOT, WORKERS

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[^]]*\])?(?P<bounds>.*)")


def requirements() -> list[str]:
    """All direct dependencies, those of the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    return [one for one in given if not one.startswith("rlft[")]


def chosen(requirement: str, rule: str, kept: Sequence[str] = ()) -> str:
    """The requirement of one version by the rule, or as it stands among `kept`."""
    requirement, _, marker = requirement.partition(";")
    found = REQUIREMENT.fullmatch(requirement.replace(" ", ""))
    assert found is not None, requirement
    name = found["name"] + (found["extras"] or "")
    version = next((one for one in kept if re.split(r"[=<>!~]", one)[0] == found["name"]), None)
    if version is None:
        bound = re.search(r"[>=]=([\w.]+)", found["bounds"])
        if rule == "lowest" and bound is None:
            raise SystemExit(f"{requirement!r} in pyproject.toml has no lowest version")
        version = f"{name}=={bound[1]}" if rule == "lowest" and bound is not None else name
    return f"{version};{marker}" if marker else version


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=["lowest", "newest"])
    parser.add_argument("--keep", nargs="*", default=[], metavar="NAME==VERSION")
    parser.add_argument("--parts", nargs="*", default=[], metavar="PATH", help="of the tests; all by default")
    given = parser.parse_args()
    directory = ROOT / f".venv-{given.rule}"
    venv.create(directory, with_pip=True, clear=True)
    run = [str(directory / "bin" / "python"), "-m"]
    wanted = [chosen(one, given.rule, given.keep) for one in requirements()]
    print(" ".join(wanted), flush=True)
    subprocess.run([*run, "pip", "install", "-q", *wanted], cwd=ROOT, check=True)
    subprocess.run([*run, "pip", "install", "-q", "--no-deps", "-e", "."], cwd=ROOT, check=True)
    subprocess.run([*run, "pip", "check"], cwd=ROOT, check=False)  # says what does not go together, and goes on
    return subprocess.run([*run, "pytest", "-q", *WORKERS, *given.parts], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
