"""Settings that do not go together end train.py with 2, one line that says why, and no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_run import Workplace, last_line, run_here


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLFT_CACHE", str(directory / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Workplace(directory)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=completions"], "algo (PolicyGradient) reads prompts (data=reviews, shakespeare, prompts), or "),
        (["algo=dpo"], "algo (Preference) reads pairs of a chosen and a rejected completion (data=preferences); data "),
        (
            ["algo=dpo", "data=preferences", "data/source=text_file"],
            "data.chosen_column=chosen: beside its text, data.source (TextFile) has no column; data/source=csv, ",
        ),
        (
            ["algo=sft", "data=completions", "data/source=sums"],
            "data.completion_column=completion: beside its text, data.source (Task) has only answer; data/source=csv",
        ),
        (
            ["algo=classification", "data=labelled", "data/source=text_file"],
            "source.prompt_column': TextFile does not take it, data/source=csv, huggingface, jsonl, parquet would; ",
        ),
        (
            ["algo=bnpo"],
            "algo/advantage cannot use the rewards of this batch: beta_normalized is for rewards of 0 and 1",
        ),
        (["algo=reinforce", "algo.target_logprob_coef=0.1"], "algo.target_logprob_coef reads the column target_ids"),
        (["algo.target_logprob_coef=0.1"], "algo.target_logprob_coef=0.1 is added to the reward of each token"),
        (["algo=distill"], "the reference is the policy itself as the run begins"),
        (["algo=distill", "reference=none"], "a KL penalty needs a reference"),
        (["reward=answer"], "reward 'answer': reward=answer needs data with a column 'answer', such as data=prompts "),
        (["reward=next_token"], "reward 'next_token': reward=next_token needs a column target_ids"),
        (["algo=kto", "data=unpaired", "algo.eval_rows=1"], "algo.eval_rows=1 must be at least 2"),
    ],
)
def test_what_does_not_go_together_ends_with_2_and_the_reason(
    work: Workplace, overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {override.partition("=")[0] for override in overrides}
    own = [  # without what the overrides put in another's place
        setting
        for setting in work.settings
        if not (setting.startswith("reward") and "reward" in groups)
        and not (setting.startswith("data") and "data/source=sums" in overrides)
    ]
    assert run_here(*own, *overrides, f"run_dir={tmp_path / 'run'}") == 2
    line = last_line(capsys.readouterr().err)
    assert line.startswith("rlft: ConfigError: ") and message in line
    assert not (tmp_path / "run" / "summary.json").exists()
