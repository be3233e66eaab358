"""`python -m rlft verify`: everything passes, and what it prints and writes. Broken parts are in test_broken_*.py."""

from __future__ import annotations

import json
import math

import pytest

from rlft import build
from rlft import cli as command
from rlft.core.errors import ConfigError
from rlft.verify import groups, invariance, neural, sampled, training
from rlft.verify.cases import CASES
from rlft.verify.page import expected
from rlft.verify.runner import NEURAL, PARTS, guarded, names, verify
from rlft.verify.verdict import Row

UNBIASED = [case for case in CASES if case.scale is not None]


def wrong(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.is_right]


def test_every_online_algorithm_is_verified():
    online = set()
    for path in (build.CONF / "algo").glob("*.yaml"):
        if path.stem != "policy_gradient" and "policy_gradient" in path.read_text():
            online.add(path.stem)
    assert {"grpo", "ppo", "rwr"} <= online
    assert online == {case.algo for case in CASES} == {course.case.algo for course in training.courses()}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_right(part):
    assert wrong(PARTS[part]()) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_is_its_formulas_and_no_cut_or_padding_or_order_matters(case):
    assert wrong(groups.rows_of(case, is_small=True) + invariance.rows_of(case)) == []


@pytest.mark.parametrize("name", ["rloo", "dr_grpo"])
def test_expected_gradients_are_exact_sampled_and_through_a_network(name):
    (case,) = (case for case in CASES if case.name == name)
    assert wrong(sampled.gradients(case) + neural.rows_of(case)) == []


def test_rloo_and_bnpo_end_where_they_should():
    courses = {(course.case.name, course.name): course for course in training.courses()}
    rows = [training.trained(courses[key]).rows() for key in (("rloo", "two prompts"), ("bnpo", "parity"))]
    assert [wrong(found) for found in rows] == [[], []]
    assert [found[0].expected for found in rows] == [0.0, pytest.approx(0.06, abs=0.002)]


@pytest.mark.slow
def test_the_whole_command_passes_prints_one_table_and_writes_its_files(tmp_path, capsys):
    assert command.main(["verify", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("rlft verify") == 1
    content = json.loads((tmp_path / "verify.json").read_text())
    assert {row["verdict"] for row in content["rows"]} == {"pass"}
    assert {row["algorithm"].split(",")[0] for row in content["rows"]} == set(names())
    assert {one["name"] for one in content["trained"]} == {case.algo for case in CASES}
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_the_command_shows_only_what_is_asked_for(tmp_path, capsys):
    assert command.main(["verify", "--only", "optimum", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "E[r]" in printed and "grpo" not in printed and "16 of 16 rows pass" in printed
    rows = json.loads((tmp_path / "verify.json").read_text())["rows"]
    page = (tmp_path / "verify.md").read_text()
    assert page.count("| pass |") == len(rows) == 16 and "16 of 16 rows pass" in page
    assert set(rows[0]) == {"algorithm", "property", "expected", "measured", "tolerance", "relation", "verdict"}
    assert not (tmp_path / "frontier.png").exists()  # nothing was trained


def test_a_wrong_row_is_told_on_stderr_and_by_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PARTS, "optimum", lambda: [Row("optimum", "two is three", 3.0, 2.0, 0.5)])
    assert command.main(["verify", "--only", "optimum", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "FAIL" in said.out and "0 of 1 rows pass" in said.out
    assert said.err == "rlft: optimum: two is three: measured 2\n"


def test_an_unknown_name_and_a_missing_checkout_are_refused(tmp_path, capsys, monkeypatch):
    assert command.main(["verify", "--only", "grop", "--out", str(tmp_path)]) == 2
    assert "did you mean 'grpo'?" in capsys.readouterr().err
    monkeypatch.setattr(build, "CONF", tmp_path)
    build_node = build.algorithm_node
    with pytest.raises(ConfigError, match="install rlft again"):
        build_node("grpo")


def test_what_raises_is_a_row_that_failed_and_the_others_are_still_found(monkeypatch):
    def broken():
        raise ZeroDivisionError("by hand")

    monkeypatch.setitem(PARTS, "optimum", broken)
    found = verify(["optimum", "kl"])
    assert [row.claim for row in wrong(found.rows)] == ["raised ZeroDivisionError: by hand"]
    assert len(found.rows) > 10 and found.trained == []
    assert guarded("x", lambda: []) == []


@pytest.mark.parametrize(
    ("relation", "measured", "is_right"),
    [
        ("=", 1.1, True), ("=", 0.9, True), ("=", 1.11, False), ("=", 0.89, False), ("=", math.nan, False),
        ("<=", 1.1, True), ("<=", -9.0, True), ("<=", 1.11, False), ("<=", -math.inf, False),
        (">=", 0.9, True), (">=", 9.0, True), (">=", 0.89, False), (">=", math.nan, False),
    ],
)  # fmt: skip
def test_a_row_is_right_within_its_tolerance(relation, measured, is_right):
    row = Row("a", "b", 1.0, measured, 0.1 + 1e-12, relation)
    assert row.is_right is is_right
    assert row.as_dict()["verdict"] == ("pass" if is_right else "FAIL")


def test_what_a_row_allows_is_shown():
    assert expected(Row("a", "b", 0.5, 0.5, 0.01)) == "0.5 ± 0.01"
    assert expected(Row("a", "b", 3.0, 0.5, 0.0, "<=")) == "≤ 3"
    assert expected(Row("a", "b", 1e-6, 0.5, 0.0, ">=")) == "≥ 1e-06"


def test_networks_are_verified_where_there_is_an_exact_answer():
    assert set(NEURAL) <= {case.name for case in UNBIASED}
