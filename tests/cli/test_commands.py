"""The command line as a person meets it: help, mistakes, completion, and the three ways to call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlft import cli

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "numba", "datasets", "hydra", "matplotlib", "scipy")


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=120
    )


def test_usage_names_every_command_and_imports_nothing_heavy(tmp_path):
    script = (
        "import sys; from rlft.cli import main; code = main(['--help']);"
        f"print([m for m in {HEAVY!r} if m in sys.modules]); sys.exit(code)"
    )
    done = run("-c", script, cwd=tmp_path)
    *usage, heavy = done.stdout.splitlines()
    assert done.returncode == 0 and heavy == "[]"
    assert {line.split()[0] for line in usage if line.startswith("  ")} >= set(cli.COMMANDS)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name not in ("train", "rank")])
def test_help_has_an_example_that_the_command_takes(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    examples = capsys.readouterr().out.split("examples:\n", 1)[1].strip().splitlines()
    module = __import__(f"rlft.cli.{cli.MODULES.get(name, name)}", fromlist=["parser"])
    for line in examples:
        words = line.split("rlft ", 1)[1].split(" > ")[0].replace('"The film"', "film").split()
        assert words[0] == name
        module.parser().parse_args(words[1:])


@pytest.mark.parametrize("name", ["train", "rank"])
def test_hydras_help_has_examples_and_the_groups(name, capsys):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"  rlft {name} " in out and "reward: answer, custom" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian' (did you mean 'train'?)"),
        (["verify", "--onyl"], "unrecognized arguments: --onyl; rlft verify --help"),
        (["report"], "the following arguments are required"),
        (["eval"], "the following arguments are required"),
        (["eval", "eval_prompts=8"], "no policy is given"),
        (["sample", "nowhere/at/all", "--prompt", "a"], "path='nowhere/at/all': there is no such file"),
        (["sample", "package:rlft/assets/tiny", "--prompt", "a", "--temperature", "0"], "--greedy"),
        (["sample", "package:rlft/assets/tiny", "--prompt", "a", "-n", "0"], "-n must be at least 1"),
        (["sample", "package:rlft/assets/tiny", "--file", "/no/such/file"], "No such file"),
        (["sample", "package:rlft/assets", "--prompt", "a"], "holds no policy"),
        (["export", "package:rlft/assets/tiny", "rlft"], "no empty directory"),
        (["export", "package:rlft/assets/tiny", "out", "--dtype", "float8"], "invalid choice"),
        (["train", "learning_rat=1"], "unknown setting 'learning_rat' (did you mean 'learning_rate'?)"),
        (["train", "algo.kl.ceof=1"], "unknown setting 'algo.kl.ceof' (did you mean 'coef'?)"),
        (["train", "experiment=sums"], "is added by +experiment=NAME"),
        (["train", "advantage=leave_one_out"], "is chosen by algo/advantage=NAME"),
        (["train", "steps=abc"], "steps=abc is a str; a whole number is allowed"),
        (["train", "trusted_modules=mine"], "trusted_modules is a list: trusted_modules=[…]"),
        (["sample", "package:rlft/assets/tiny", "--prompt", "a", "--chat"], "no chat template"),
        (["sample", "nowhere", "--prompt", "a"], "nowhere is no run directory, checkpoint or model"),
        (["train", "algo=gropo"], "algo=gropo does not exist (did you mean 'grpo'?)"),
        (["train", "data=preferences_csv"], "does not exist (did you mean 'data=preferences data/source=csv'?)"),
        (["train", "data=reviews_text"], "does not exist (did you mean 'data=text data/source=reviews'?)"),
        (
            ["train", "data=sums"],
            "data=sums does not exist: data/source=sums does, and is chosen with data=comple",
        ),
        (["train", "data/source=csv"], "unknown setting 'data/source'; it is chosen with data=completions, contexts, "),
        (["train", "data=text", "data/source=jsnol"], "data/source=jsnol does not exist (did you mean 'jsonl'?)"),
        (["train", "algo=dpo", "algo/critic=shared"], "unknown setting 'algo/critic'; it is chosen with algo=bnpo, "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlft: ConfigError: ") and message in line


def test_a_wrong_root_setting_is_refused_before_torch_is_imported(tmp_path):
    script = (
        "import sys; from rlft.cli import main; code = main(['train', 'steps=-1']);"
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = run("-c", script, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()) == (2, ["False"]), done.stderr


@pytest.mark.parametrize("command", [["-m", "rlft", "train"], [str(ROOT / "train.py")]])
def test_each_way_to_call_it_composes_the_same_from_any_directory(command, tmp_path):
    done = run(*command, "steps=3", "--cfg", "job", "--package", "steps", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "3"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_yaml_files_of_ones_own_join_by_config_dir_and_by_search_path(tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text("# @package _global_\nsteps: 7\n")
    for place in (["--config-dir", "mine"], ["hydra.searchpath=[file://mine]"]):
        done = run(
            "-m", "rlft", "train", *place, "+experiment=short", "--cfg", "job", "--package", "steps", cwd=tmp_path
        )
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "7"), done.stderr


def completions(line: str, tmp_path: Path) -> list[str]:
    """What a shell is offered behind `line` (argcomplete writes it to descriptor 8)."""
    (tmp_path / "rlft").write_text("import sys\nfrom rlft.cli import command\nsys.exit(command())\n")
    env = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    shell = f"exec {sys.executable} {tmp_path / 'rlft'} 8>{tmp_path / 'found'} 9>&2"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    subprocess.run(["bash", "-c", shell], check=True, env=environment, timeout=120, capture_output=True)
    return (tmp_path / "found").read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("rlft ev", "eval"), ("rlft train algo=gr", "algo=grpo"), ("rlft train reward.sent", "reward.sentiment."),
     ("rlft report --at", "--at-kl")],
)  # fmt: skip
def test_the_shell_completes_commands_settings_and_flags(line, expected, tmp_path):
    assert expected in [word.strip() for word in completions(line, tmp_path)]


def test_a_reader_that_has_had_enough_ends_it_without_a_traceback(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("film\n" * 2000)
    command = f"{sys.executable} -m rlft sample package:rlft/assets/tiny --file {prompts} --max-new-tokens 1 --json"
    shell = f"{command} 2>{tmp_path / 'err'} | head -1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert json.loads(done.stdout)["prompt"] == "film"
    assert (tmp_path / "err").read_text() == ""
