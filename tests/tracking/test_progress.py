from __future__ import annotations

import io
import math
import re
import sys

import pytest
from rich.console import Console

from rlft.core.errors import ConfigError
from rlft.core.printable import printable
from rlft.tracking.progress import Progress

ONLINE = {
    "step": 40, "loss": 0.5, "reward": 0.4123, "reward_std": 0.3, "kl": 0.0211, "entropy": 3.1, "learning_rate": 1e-4,
    "completions/mean_length": 23.9, "tokens_per_second": 1520.4, "step_time": 2.0, "time/decode": 0.9,
    "time/update": 1.04,
}  # fmt: skip
SUPERVISED = {"loss": 1.23456, "eval/perplexity": 23.1, "learning_rate": 1e-4, "entropy": 2.0, "tokens_per_second": 900}
HOSTILE = "[bold]x[/red] :smile: a\nb\x1b[31m\x9b\u202e\ud800 [link=x]"
SHOWN = r"[bold]x[/red] :smile: a\nb\x1b[31m\x9b\u202e\ud800 [link=x]"


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(total_steps: int = 100, **options) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)  # narrower than a plain line
    return Progress(total_steps=total_steps, console=console, **options), out


def terminal(total_steps: int = 100, width: int = 100, **options) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=width, height=40, color_system=None)
    return Progress(total_steps=total_steps, console=console, **options), out


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_plain_line_holds_what_an_online_step_says():
    clock = FakeClock()
    progress, out = plain(clock=clock)
    with progress:
        progress.step(39, {"reward": 0.0})
        clock.now = 0.8
        out.truncate(0), out.seek(0)
        progress.step(40, ONLINE)
    assert out.getvalue() == (
        "step   40/100  reward 0.412 ±0.30  kl 0.021  entropy 3.10  length 23.9  1,520 tok/s  gen 45% update 52%"
        "  ETA 0:48\n"
    )


def test_a_plain_line_of_a_supervised_step_shows_loss_perplexity_rate_and_speed_only():
    progress, out = plain()
    with progress:
        progress.step(7, SUPERVISED)
    assert out.getvalue() == "step    7/100  loss 1.2346  perplexity 23.10  lr 1.0e-04  900 tok/s  ETA -:--\n"


def test_plain_lines_come_each_log_every_steps_and_at_evaluations_and_at_the_end():
    progress, out = plain(total_steps=11, log_every=5)
    with progress:
        for step in range(12):
            progress.step(step, {"reward": 0.5} | ({"eval/reward": 0.25} if step == 3 else {}))
    lines = out.getvalue().splitlines()
    assert [int(re.match(r"step +(\d+)/11 ", line)[1]) for line in lines] == [0, 3, 5, 10, 11]
    assert ["eval reward 0.250" in line for line in lines] == [False, True, False, False, False]


def test_plain_lines_have_no_escape_codes_and_are_flushed_one_by_one():
    flushed = []

    class Pipe(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    progress = Progress(total_steps=2, console=Console(file=Pipe()))
    with progress:
        progress.step(1, ONLINE)
        assert flushed[-1].count("\n") == 1 and flushed[-1].endswith("ETA 0:02\n")
    assert "\x1b" not in flushed[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("make", [plain, terminal])
def test_metrics_that_are_not_finite_show_as_nan(make, value):
    for metrics in (ONLINE, SUPERVISED):
        progress, out = make(width=160) if make is terminal else make()
        with progress:
            progress.step(1, dict.fromkeys(metrics, value))
            progress.step(2, dict.fromkeys(metrics, value))
        last = without_codes(out.getvalue()).splitlines()[-1]
        assert last.count("nan") == (8 if metrics is ONLINE else 4)
        assert "inf" not in last


def test_the_eta_follows_the_pace_of_the_last_steps_and_ends_at_zero():
    clock = FakeClock()
    progress, out = plain(total_steps=100, log_every=10, clock=clock)
    with progress:
        for step in range(0, 101, 10):  # the first half at 1 s a step, the second at 60 s
            clock.now += 10 if step <= 50 else 600
            progress.step(step, {"step_time": 1e9} if step else {})
    etas = [line.rsplit("ETA ")[1] for line in out.getvalue().splitlines()]
    assert etas[:3] == ["-:--", "1:30", "1:20"]
    assert etas[6] == "7:13"  # 40 steps at (5 * 10 + 600) / 60 seconds
    assert etas[-1] == "0:00"
    progress, out = plain(total_steps=7300, clock=clock)
    with progress:
        progress.step(100, {"step_time": 1.0})  # the first step after a resume
    assert out.getvalue().endswith("ETA 2:00:00\n")


def test_the_time_split_is_over_steps_with_and_without_a_rollout():
    progress, out = plain()
    with progress:
        progress.step(1, {"reward": 0, "step_time": 3.0, "time/decode": 2.0, "time/update": 1.0})
        progress.step(2, {"reward": 0, "step_time": 1.0, "time/update": 1.0})
        progress.step(3, {"reward": 0, "time/update": 0.5, "time/reward": 0.5})  # no step_time: the sum of the parts
    assert [line.split("gen ")[1].split("  ")[0] for line in out.getvalue().splitlines()] == [
        "67% update 33%", "50% update 50%", "40% update 50%",
    ]  # fmt: skip


def test_a_terminal_gets_a_live_bar_with_the_latest_values_and_a_clean_end():
    clock = FakeClock()
    progress, out = terminal(clock=clock)
    with progress:
        progress.step(39, {"eval/reward": 0.25})
        clock.now = 10.0
        progress.step(40, ONLINE)
    *_, bar, head, values = without_codes(out.getvalue()).rstrip("\n").splitlines()
    assert re.fullmatch(r"step 40/100  ━{9}╸ +0:10 elapsed  ETA 10:00 *", bar)  # 40 % of 24 characters
    for label, value in {"reward": "0.412 ±0.30", "kl": "0.021", "entropy": "3.10", "length": "23.9",
                         "eval reward": "0.250", "tok/s": "1,520", "time": "gen 45% update 52%"}.items():  # fmt: skip
        start = re.search(rf"(?<!eval )\b{label}\b", head).start()
        assert values[start:].startswith(value), label
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is shown again
    assert "loss" not in head


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_or_error_passes_through_and_leaves_the_terminal_clean(error):
    progress, out = terminal()
    stdout = sys.stdout
    with pytest.raises(error), progress:
        progress.step(1, ONLINE)
        assert sys.stdout is not stdout  # rich redirects it above the display
        raise error
    assert sys.stdout is stdout
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")
    length = len(out.getvalue())
    progress.message("after")
    assert out.getvalue()[length:] == "after\n"  # the display is not drawn again


def test_a_terminal_that_only_shows_the_plan_gets_no_bar():
    progress, out = terminal()
    with progress:
        progress.plan([("device", "cpu"), ("samples per step", "8 prompts x 8 = [64]")])
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [["device", "cpu"], ["samples", "per", "step", "8", "prompts", "x", "8", "=", "[64]"]]


def test_the_plan_is_aligned_in_plain_text():
    progress, out = plain()
    progress.plan([("device", "cpu"), ("samples per step", "64 [b]")])
    assert out.getvalue() == "device            cpu\nsamples per step  64 [b]\n"


def test_a_comparison_has_a_line_for_each_metric_of_both():
    progress, out = plain()
    progress.comparison("Held-out", before={"eval/reward": 0.1, "eval/kl": 0.0}, after={"eval/reward": float("nan")})
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["Held-out", "before", "after"],
        ["eval/reward", "0.100", "nan"],
    ]


def test_generated_text_cannot_break_plain_lines():
    progress, out = plain()
    progress.samples(HOSTILE, [{"prompt": HOSTILE, "completion": HOSTILE, "reward": 0.5}])
    assert out.getvalue() == f"{SHOWN}\n{SHOWN} | {SHOWN} (0.500)\n"


def test_generated_text_cannot_break_the_terminals_table():
    progress, out = terminal(width=300)
    with progress:
        progress.step(1, ONLINE)
        length = len(out.getvalue())
        rows = [
            {"prompt": HOSTILE, "completion": "fine", "reward": -1.0},
            {"prompt": "p", "completion": HOSTILE, "reward": None},
        ]
        progress.samples(HOSTILE, rows)
    text = without_codes(out.getvalue()[length:])
    assert text.count(SHOWN) == 3
    assert re.search(r"│ fine +│ -1\.000 │", text) and re.search(r"│ +nan │", text)


def test_long_generated_text_is_shown_whole():
    progress, out = terminal(width=60)
    completion = "x" * 200
    progress.samples("t", [{"prompt": "p", "completion": completion, "reward": 0.0}])
    assert out.getvalue().count("x") == 200


def test_samples_without_a_reward_have_no_reward_column():
    for make in (plain, terminal):
        progress, out = make()
        progress.samples("t", [{"prompt": "", "completion": "words"}])
        assert "nan" not in out.getvalue() and "reward" not in out.getvalue() and "words" in out.getvalue()


def test_messages_keep_their_lines_and_are_no_markup():
    progress, out = plain()
    progress.message("loss [red]nan[/red] \x1b[2J:smile:\nsecond " + "long " * 20 + "end")
    assert out.getvalue() == "loss [red]nan[/red] \\x1b[2J:smile:\nsecond " + "long " * 20 + "end\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_that_cannot_encode_a_character_gets_it_escaped(is_terminal):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(file=file, force_terminal=is_terminal, force_interactive=is_terminal, width=120)
    with Progress(total_steps=2, console=console) as progress:
        progress.step(1, ONLINE)
        progress.samples("é", [{"prompt": "naïve 🙂", "completion": "ok", "reward": 1.0}])
        progress.plan([("é", "é")])
        progress.message("é")
    file.flush()
    assert b"\\xb10.30" in raw.getvalue() and b"na\\xefve \\U0001f642" in raw.getvalue()


def test_printable_keeps_letters_and_escapes_the_rest():
    assert printable("aé 漢🙂\t\x00\u200b") == "aé 漢🙂\\t\\x00\\u200b"


def test_standard_output_that_is_no_terminal_gets_plain_lines_whatever_force_color_says(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = Progress(total_steps=2)
    assert not progress.interactive
    with progress:
        progress.step(1, ONLINE)
    assert "\x1b" not in capsys.readouterr().out


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="total_steps must be at least 0, got -1"):
        Progress(total_steps=-1)
    with pytest.raises(ConfigError, match="log_every must be at least 1, got 0"):
        Progress(total_steps=1, log_every=0)
