from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import Accelerator

from rlft.core.metrics import Clock, JsonlFile, Metrics


def test_mean_over_unequal_micro_batches_is_the_global_mean_not_the_mean_of_means():
    means = Metrics()
    means.add("x", torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    means.add("x", torch.tensor([60.0]))
    assert means.local() == {"x": 12.5}  # 75 / 6; the mean of means would be 31.5


def test_mean_counts_what_its_mask_counts():
    means = Metrics()
    means.add("x", torch.tensor([[1.0, torch.nan], [3.0, torch.inf]]), torch.tensor([[True, False], [True, False]]))
    means.add("x", torch.tensor([[8.0, 9.0]]), torch.tensor([[1.0, 0.0]]))  # a float mask
    assert means.local() == {"x": 4.0}


def test_mean_does_not_depend_on_how_the_batch_was_cut():
    x = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = x > -0.5
    for size in (1, 3, 40):
        means = Metrics()
        for part, part_mask in zip(x.split(size), mask.split(size), strict=True):
            means.add("x", part, part_mask)
        assert means.local()["x"] == pytest.approx(float(x[mask].mean()), rel=1e-12)


def test_mean_of_indicators_is_a_fraction():
    means = Metrics()
    means.add("share", torch.tensor([True, False, False, True]))
    assert means.local() == {"share": 0.5}


def test_mean_over_nothing_is_left_out_and_a_counted_nan_is_seen():
    means = Metrics()
    means.add("none", torch.tensor([1.0]), torch.tensor([False]))
    means.add("bad", torch.tensor([1.0, torch.nan]))
    row = means.local()
    assert "none" not in row
    assert math.isnan(row["bad"])


def test_maximum_is_over_counted_entries_of_all_micro_batches():
    means = Metrics()
    means.add_max("m", torch.tensor([-5.0, 100.0]), torch.tensor([True, False]))
    means.add_max("m", torch.tensor([-7.0, -6.0]))
    assert means.local() == {"m": -5.0}


def test_reduce_on_one_process_gives_the_local_row():
    means = Metrics()
    means.add("x", torch.tensor([1.0, 4.0]))
    means.add_max("m", torch.tensor([3.0, 2.0]))
    assert means.reduce(Accelerator(cpu=True)) == means.local() == {"x": 2.5, "m": 3.0}


def test_sums_keep_no_graph():
    means, x = Metrics(), torch.ones(2, requires_grad=True)
    means.add("x", x * 2)
    assert not means._sums["x"].requires_grad


def test_clock_adds_up_parts_and_starts_again_when_taken(monkeypatch):
    now = iter([0.0, 1.5, 10.0, 10.25, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    for name in ("a", "a", "b"):
        with clock(name):
            pass
    assert clock.take() == {"time/a": 1.75, "time/b": 4.0}
    assert clock.take() == {}


def strict(line: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null_at_any_depth(tmp_path):
    file = JsonlFile(tmp_path / "m.jsonl")
    file.write({"step": 1, "loss": math.nan, "top": math.inf, "rewards": {"a": -math.inf, "b": 0.5}, "l": [math.nan]})
    row = strict(file.path.read_text())
    assert row == {"step": 1, "loss": None, "top": None, "rewards": {"a": None, "b": 0.5}, "l": [None]}


def test_a_float_comes_back_with_the_same_bits(tmp_path):
    file = JsonlFile(tmp_path / "m.jsonl")
    file.write({"step": 1, "x": 0.1 + 0.2, "text": "né\n"})
    assert strict(file.path.read_text()) == {"step": 1, "x": 0.1 + 0.2, "text": "né\n"}


def test_truncate_drops_the_rows_of_later_steps(tmp_path):
    file = JsonlFile(tmp_path / "m.jsonl")
    for step in (0, 1, 1, 2, 3):
        file.write({"step": step})
    file.truncate_after(1)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [0, 1, 1]
    file.write({"step": 2})
    assert file.path.read_text().endswith('{"step": 1}\n{"step": 2}\n')


@pytest.mark.parametrize("half", ['{"step": 2, "los', '{"step": 2', "{", '{"step": 2, "text": "caf\xc3'])
def test_truncate_drops_a_last_line_that_a_kill_left_half_written(tmp_path, half):
    file = JsonlFile(tmp_path / "m.jsonl")
    file.write({"step": 1, "loss": 0.5})
    with file.path.open("ab") as raw:
        raw.write(half.encode("latin-1"))  # the last case ends within a character
    file.truncate_after(2)
    assert file.path.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_truncate_keeps_texts_with_unusual_line_ends(tmp_path):
    file = JsonlFile(tmp_path / "m.jsonl")
    file.write({"step": 1, "completion": "a\u2028b\x85c\x0bd"})
    before = file.path.read_bytes()
    file.truncate_after(1)
    assert file.path.read_bytes() == before


def test_truncate_before_the_first_step_empties_the_file_and_a_missing_one_is_fine(tmp_path):
    file = JsonlFile(tmp_path / "m.jsonl")
    file.truncate_after(-1)
    assert not file.path.exists()
    file.write({"step": 0})
    file.truncate_after(-1)
    assert file.path.read_text() == ""
