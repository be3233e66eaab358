"""The benchmarks' own code runs, at toy sizes, and writes what its pages are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import curves, gpu, ours, versus


@pytest.mark.parametrize("work", ["grpo", "grpo --beta 0.04 --ragged", "ppo --group 1", "sft", "generate"])
def test_every_work_runs_and_says_what_it_took(work: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    flags = f"{work} --prompts 2 --plen 8 --clen 4 --steps 2 --warmup 1 --vocab 100".split()
    monkeypatch.setattr(sys, "argv", ["ours", *flags])
    ours.main()
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(made["steps"]) == 2
    assert min(made["steps"]) <= made["step_s"] <= max(made["steps"])
    assert 0 < made["parts"]["mfu"] < 1
    assert made["params"] == 61312 + 4 * 32  # four tokens more than the preset
    if work.startswith("grpo"):
        assert {"time/prefill", "time/decode", "time/update", "update_mfu"} <= made["parts"].keys()


def test_a_row_of_the_table() -> None:
    ours_line = {"steps": [1.0, 2.0, 1.5], "rss_gb": 0.5, "parts": {"mfu": 0.25, "update_mfu": 0.5}, "threads": 2,
                 "torch": "2"}  # fmt: skip
    peer_line = {"steps": [4.0, 6.0, 5.0], "rss_gb": 1.0, "trl": "1.16.0", "torch": "2"}
    made = versus.row([(peer_line, ours_line)], warmup=2, commit="abc")
    assert made["ratio"] == pytest.approx(5.0 / 1.5)
    line = versus.rendered({"a work": made}).splitlines()[2]
    assert line.startswith("| a work | 5 (4 to 6) | 1.5 (1 to 2) | **3.33x** | 3.33 | 25%, 50% | 1.00, 0.50 GiB |")


def test_the_exponent_of_a_power_is_that_power(tmp_path) -> None:
    points = [{"size": n, "seconds": 3 * n**1.5, "gib": 2.0 + n, "range": [0, 1], "parts": {}} for n in (1, 2, 4, 8)]
    assert curves.exponent(points, "seconds") == pytest.approx(1.5)
    assert "| n | 1, 8 | 3, 67.9 | 3.00, 10.00 | 1.50 |" in curves.rendered({"n": points}, "when and where")
    curves.draw({"n": points, "m": points}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_gpu_script_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "sees no GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_script_runs_at_toy_sizes() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--cpu"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert made.returncode == 0, made.stdout + made.stderr
