from __future__ import annotations

import sys

import pytest

from rlft.data import progress_bar
from rlft.data.progress_bar import reported


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(progress_bar, "SHOWN_FROM", {"bytes": 10, "texts": 10})


def show(total):
    with reported("reading a.jsonl", total, unit="texts") as advance:
        for _ in range(total):
            advance(1)


def test_small_work_says_nothing(capsys):
    show(9)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_it_is_one_line_on_stderr(capsys):
    show(1000)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("rlft: reading a.jsonl (1,000 texts)")


def test_on_a_terminal_a_bar_goes_to_its_end(capsys, monkeypatch):
    updates = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress_bar.Progress, "update", lambda self, task, advance: updates.append(advance))
    show(1000)
    assert sum(updates) == 1000 and len(updates) <= progress_bar.REPORT_SHARE
    assert capsys.readouterr().out == ""
