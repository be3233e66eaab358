"""`data.source.validation=0`: every kind of algorithm trains to the end, and evaluates nothing."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[1] / "train.py"
WORDS = ["the", "kettle", "hums", "and", "a", "lantern", "glows", "beside", "an", "old", "bridge"]
TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS[:5]]
ROWS = {
    "prompts": [{"prompt": text} for text in TEXTS],
    "completions": [{"prompt": text, "completion": " yes"} for text in TEXTS],
    "preferences": [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in TEXTS],
    "unpaired": [{"prompt": text, "completion": " yes", "label": i % 2} for i, text in enumerate(TEXTS)],
    "labelled": [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)],
}
ONLINE = ["reward=length", "prompts_per_step=2", "group_size=2", "max_new_tokens=3"]
CHOICES = {
    "grpo": ["algo=grpo", "data=prompts", *ONLINE],
    "online_dpo": ["algo=online_dpo", "data=prompts", *ONLINE],
    "sft on completions": ["algo=sft", "data=completions"],
    "sft on text": ["algo=sft", "data=text", "data.block_size=8"],
    "denoise": ["algo=denoise", "data=text", "data.block_size=8", "model.is_causal=false"],
    "dpo": ["algo=dpo", "data=preferences"],
    "kto": ["algo=kto", "data=unpaired"],
    "reward_model": ["algo=reward_model", "data=preferences"],
    "classification": ["algo=classification", "data=labelled"],
}


def run(tmp_path: Path, *overrides: str) -> int:
    (data,) = [o.removeprefix("data=") for o in overrides if o.startswith("data=")]
    path = tmp_path / "data"
    lines = "\n\n".join(TEXTS) if data == "text" else "\n".join(map(json.dumps, ROWS[data]))
    path.write_text(lines + "\n")
    settings = [
        "model=gpt2_scratch", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.n_positions=64",
        "model.tokenizer.vocab_size=260", f"data.source.path={path}", "data.source.validation=0", "tracker=none",
        "hardware=cpu", "hardware.num_threads=1", "steps=2", "save_every=0", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("RLFT_CACHE", str(tmp_path / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", [str(TRAIN), *settings, *overrides])
        runpy.run_path(str(TRAIN), run_name="__main__")
    return ended.value.code  # type: ignore[return-value]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_run_with_nothing_held_out_trains_without_evaluation(tmp_path, choice):
    assert run(tmp_path, *CHOICES[choice]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not any(name.startswith("eval/") for row in rows for name in row)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["evaluation"] == {"before": {}, "after": {}} and summary["best"]["step"] is None
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))
    samples = tmp_path / "run" / "samples.jsonl"  # of the training completions, where there are any
    assert not samples.exists() or '"eval"' not in samples.read_text()


@pytest.mark.parametrize("setting", [["eval_every=1"], ["eval_every=1", "patience=1"], ["steps=0"]])
def test_settings_that_ask_for_an_evaluation_are_refused(tmp_path, capsys, setting):
    assert run(tmp_path, *CHOICES["sft on text"], *setting) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "asks for an evaluation" in error and "data.source.validation" in error
    assert setting[-1] in error


def test_an_empty_split_that_was_asked_for_says_how_to_go_without(tmp_path, capsys):
    assert run(tmp_path, *CHOICES["dpo"], "data.source.validation=1e-9") == 3
    assert "data.source.validation=0 to train without evaluation" in capsys.readouterr().err.splitlines()[-1]
