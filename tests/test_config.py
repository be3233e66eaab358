"""conf/ and rlft/config.py: every file composes and passes; what is unknown, mistyped or missing is refused by name."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlft.config import RootConfig, checked, missing_keys
from rlft.core.errors import ConfigError
from rlft.core.settings import RootSettings
from rlft.saved_config import foreign_code, from_run

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT / "conf").with_suffix("").as_posix() for path in (ROOT / "conf").glob("*/**/*.yaml")
)
EXPERIMENTS = [name for name in FILES if name.startswith("experiment/")]
CHOICES = [name for name in FILES if name not in EXPERIMENTS]
# What files leave open, as ???, for the person who chooses them.
VALUES = {
    "data.source.path": "a.jsonl",
    "model.path": "gpt2",
    "reference.path": "gpt2",
    "reward.custom.function": "package.module:name",
    "reward.keyword.keywords": "[great]",
    "reward.reward_model.path": "gpt2",
}
# What conf/algo/policy_gradient.yaml, the part that the online algorithms share, leaves to them.
PARTS = {
    "algo.advantage": "+algo/advantage=returns",
    "algo.surrogate": "+algo/surrogate=clipped",
    "algo.aggregation": "+algo/aggregation=token_mean",
    "algo.kl": "+algo/kl=none",
}
# Files that do not go with the defaults, and what they go with.
NEEDS = {
    "algo/policy_gradient": list(PARTS.values()),
    "model/char_scratch": ["data=contexts", "data/source=shakespeare"],
    **{file: ["data=prompts"] for file in FILES if file.startswith("data/source/")},
}


def composed(*overrides: str, config_dir: Path = ROOT / "conf") -> Any:
    """conf/train.yaml with these overrides; `name`, which Hydra's runtime would fill in, is given."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return compose("train", overrides=["name=test", *overrides])


def config(*overrides: str) -> RootConfig:
    return checked(composed(*overrides))


@functools.cache
def defaults() -> Any:
    made = composed()
    OmegaConf.set_struct(made, False)  # an experiment file adds what it likes
    return made


def edited(*values: str) -> RootConfig:
    """The defaults with these values set or added as an experiment file would; ten times faster than to compose."""
    return checked(OmegaConf.merge(defaults(), OmegaConf.from_dotlist(list(values))))


def text_of(file: str) -> str:
    return (ROOT / "conf" / f"{file}.yaml").read_text()


def choice(file: str) -> str:
    """The override that chooses a file: algo/kl/k2 -> algo/kl=k2."""
    group, name = file.rsplit("/", 1)
    return f"+experiment={name}" if group == "experiment" else f"{group}={name}"


def left_open(file: str) -> dict[str, str]:
    """The overrides that fill in what a file leaves open, by key."""
    if "???" not in text_of(file) and not file.startswith("data/"):  # which may begin with a source that has some
        return {}
    missing = missing_keys(OmegaConf.to_container(composed(choice(file), *NEEDS.get(file, []))))
    return {key: f"{key}={VALUES[key]}" for key in sorted(missing)}


def train_py(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60, check=False)


@pytest.fixture
def from_experiment(tmp_path):
    """Compose with an experiment file of one's own, in which Hydra adds whatever it finds."""

    def make(text: str) -> Any:
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        return composed(f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine")

    return make


@pytest.mark.parametrize("file", CHOICES)
def test_every_file_of_every_group_composes_with_the_defaults_and_passes(file):
    made = config(choice(file), *left_open(file).values(), *NEEDS.get(file, []))
    package = re.match(r"# @package (.+)", text_of(file))
    place = package[1] if package else file.rsplit("/", 1)[0].replace("/", ".")
    target = re.search(r"^_target_: (.+)", text_of(file), re.MULTILINE)
    if target:  # this file was chosen, not a default
        assert OmegaConf.select(OmegaConf.create(vars(made)), place)["_target_"] == target[1]
    is_read_back_from_a_run_directory(made, has_code=file == "reward/custom")


def is_read_back_from_a_run_directory(made: RootConfig, *, has_code: bool) -> None:
    """All that conf/ names is rlft's own, but for the function of a custom reward (`rlft.saved_config`)."""
    values = json.loads(json.dumps(asdict(made)))
    assert [key for key, _, _ in foreign_code(values)] == (["reward.custom.function"] if has_code else [])
    if not has_code:
        assert asdict(from_run(values, run_dir=Path("run"))) == asdict(made)


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_every_experiment_composes_and_passes(file):
    made = config(choice(file), *left_open(file).values())
    assert made.steps > 0
    is_read_back_from_a_run_directory(made, has_code=False)


@pytest.mark.parametrize("file", [file for file in CHOICES if ": ???" in text_of(file)])
def test_what_a_file_leaves_open_is_asked_for_by_name(file):
    values = left_open(file)
    assert len(values) == text_of(file).count(": ???")
    for key in values:
        with pytest.raises(ConfigError, match=f"^{re.escape(key)} is not set, and has no default: give"):
            config(choice(file), *(value for other, value in values.items() if other != key), *NEEDS.get(file, []))


@pytest.mark.parametrize("part", PARTS)
def test_the_shared_part_of_the_online_algorithms_is_refused_without_each_of_the_others(part):
    others = [override for name, override in PARTS.items() if name != part]
    with pytest.raises(ConfigError, match=f"^{re.escape(part)} (is not set|has no _target_)"):
        config("algo=policy_gradient", *others)


def test_the_defaults_are_the_plain_values_of_train_yaml():
    made = config()
    written: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "train.yaml"))
    for key in RootSettings.__dataclass_fields__:
        expected = {"name": "test", "betas": tuple(written["betas"]), "trusted_modules": ()}.get(key, written[key])
        assert getattr(made, key) == expected and type(getattr(made, key)) is type(expected)
    assert set(written) - set(RootSettings.__dataclass_fields__) == {"defaults", "hydra"}


def test_rewards_compose_by_name_each_with_its_own_weight():
    rewards = config("reward=[sentiment,length]", "reward.length.weight=0.5").reward
    assert {name: node["weight"] for name, node in rewards.items()} == {"sentiment": 1.0, "length": 0.5}
    assert rewards["length"]["_target_"] == "rlft.rewards.length.Length"
    assert config("reward=[]").reward == {}


@pytest.mark.parametrize(
    "override, message",
    [
        ("stepss=3", "unknown setting 'stepss' (did you mean 'steps'?)"),
        ("rewards.length.weight=3", "unknown setting 'rewards' (did you mean 'reward'?)"),
        ("algo.entropy_coeff=1", "unknown setting 'algo.entropy_coeff' (did you mean 'entropy_coef'?)"),
        ("algo.kl.coeff=1", "unknown setting 'algo.kl.coeff' (did you mean 'coef'?)"),
        ("algo.advantage.epss=1", "unknown setting 'algo.advantage.epss' (did you mean 'eps'?)"),  # a _partial_
        ("data.prompt_token=3", "unknown setting 'data.prompt_token' (did you mean 'prompt_tokens'?)"),
        ("data.source.validaton=0.1", "unknown setting 'data.source.validaton' (did you mean 'validation'?)"),
        ("model.tokenizer.pathh=x", "unknown setting 'model.tokenizer.pathh' (did you mean 'path'?)"),
        ("model.tokeniser=x", "unknown setting 'model.tokeniser' (did you mean 'tokenizer'?)"),
        ("reward.sentiment.wieght=2", "unknown setting 'reward.sentiment.wieght' (did you mean 'weight'?)"),
        (
            "tracker.project=x",
            "'tracker.project': TensorBoardTracker does not take it, tracker=wandb would; allowed: none",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        edited(override)


def test_a_setting_of_another_part_is_refused_with_the_part_that_has_it():
    with pytest.raises(ConfigError, match="score_function does not take it, algo/surrogate=clipped would; allowed"):
        config("algo=rloo", "+algo.surrogate.dual_clip=3")


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepss: 3", "unknown setting 'stepss' (did you mean 'steps'?)"),
        ("algo: {kl: {coeff: 0.1}}", "unknown setting 'algo.kl.coeff' (did you mean 'coef'?)"),
        ("data: {source: {validaton: 0.1}}", "unknown setting 'data.source.validaton' (did you mean 'validation'?)"),
        ("reward: {lenght: {weight: 2.0}}", "reward.lenght has no _target_"),  # this reward was not chosen
    ],
)
def test_a_typo_in_an_experiment_file_which_hydra_would_add_is_refused(from_experiment, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        checked(from_experiment(text))


def test_an_experiment_file_without_a_typo_passes(from_experiment):
    made = checked(from_experiment("steps: 3\nalgo: {kl: {coef: 0.1}}"))
    assert made.steps == 3 and made.algo["kl"]["coef"] == 0.1


@pytest.mark.parametrize(
    "override",
    ["steps=many", "steps=1.5", "steps=1.0", "steps=true", "steps=null", "steps=[1]", "seed=1.5", "resume=3",
     "dry_run=maybe", "learning_rate=fast", "learning_rate=true", "betas=0.9", "betas=[a,b]", "max_minutes=soon"],
)  # fmt: skip
def test_a_mistyped_root_value_is_refused_with_its_key(override):
    with pytest.raises(ConfigError, match=rf"(^|full_key: ){override.split('=')[0]}\b"):
        edited(override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("algo.samples_per_step=1.5", "algo.samples_per_step=1.5 is a float; int is allowed"),
        ("algo.samples_per_step=true", "algo.samples_per_step=True is a bool; int is allowed"),
        ("algo.kl.coef=big", "algo.kl.coef='big' is a str; float is allowed"),
        ("algo.surrogate.clip_low=x", "algo.surrogate.clip_low='x' is a str; float is allowed"),
        ("algo.kl=none", "algo.kl='none' is not a group choice; see the files under conf/algo/ (one in a folder"),
        ("data.source=a.jsonl", "data.source='a.jsonl' is not a group choice"),
        ("model.tokenizer=gpt2", "model.tokenizer='gpt2' is not a group choice"),
        ("hardware.num_threads=1.5", "hardware.num_threads=1.5 is a float; int or null is allowed"),
        ("reward.sentiment.weight=heavy", "reward.sentiment.weight='heavy' is a str; float is allowed"),
        ("reward.sentiment.timeout=null", "reward.sentiment.timeout=None is a NoneType; float is allowed"),
        ("reward.length=3", "reward.length=3 is not a group choice; see the files under conf/reward/"),
    ],
)
def test_a_mistyped_value_in_a_group_is_refused_with_its_key_and_type(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        edited(override)


@pytest.mark.parametrize("override", ["algo.kl.coef=1", "hardware.num_threads=2", "reward.sentiment.weight=-1"])
def test_a_whole_number_passes_for_a_float_and_an_optional_one_may_be_given(override):
    edited(override)


@pytest.mark.parametrize(
    "override, allowed",
    [(f"{key}=0", "at least 1") for key in ("prompts_per_step", "group_size", "max_new_tokens", "eval_prompts",
     "keep", "log_every", "micro_batch", "micro_batch_tokens", "rollout_rows", "max_tokens", "patience")]
    + [(f"{key}=-1", "at least 0") for key in ("seed", "steps", "warmup_steps", "eval_every", "save_every",
       "weight_decay", "final_learning_rate_fraction")]
    + [(f"{key}=0", "above 0") for key in ("temperature", "learning_rate", "max_grad_norm", "max_minutes")]
    + [(f"{key}={number}", "finite") for key in ("learning_rate", "weight_decay", "temperature", "max_minutes")
       for number in ("nan", "inf", "-inf")],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_what_is_allowed(override, allowed):
    key, value = override.split("=")
    with pytest.raises(ConfigError, match=rf"^{key}={re.escape(value)}(\.0)? must be {allowed}$"):
        edited(override)


SIZES = {  # algorithm: its settings that are at least 1
    "grpo": ["epochs", "minibatches", "entropy_decay_batches"],
    "dpo": ["pairs_per_step", "eval_pairs"],
    "reward_model": ["pairs_per_step", "eval_pairs"],
    "classification": ["rows_per_step", "eval_rows"],
    "kto": ["rows_per_step", "eval_rows"],
    "sft": ["rows_per_step", "eval_blocks"],
    "denoise": ["rows_per_step", "eval_blocks", "eval_levels"],
}
ROOT_SIZES = [
    "prompts_per_step", "group_size", "micro_batch", "micro_batch_tokens", "rollout_rows", "max_new_tokens",
    "eval_prompts",
]  # fmt: skip
OUT_OF_RANGE = [(0, "at least 1"), (-1, "at least 1"), (10**12, f"at most {2**31 - 1}")]  # for a size


@functools.cache
def chosen(algo: str) -> Any:
    return composed(f"algo={algo}")


def with_value(config: Any, key: str, value: Any) -> Any:
    """A copy of a composed configuration with any value at a key, also one that Hydra's grammar cannot spell."""
    made = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    OmegaConf.update(made, key, value, merge=False, force_add=True)
    return made


@pytest.mark.parametrize("value, allowed", OUT_OF_RANGE)
@pytest.mark.parametrize("name", ROOT_SIZES)
def test_a_root_size_out_of_range_is_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError, match=rf"^{name}={value} must be {allowed}$"):
        checked(with_value(defaults(), name, value))


@pytest.mark.parametrize("name", [*ROOT_SIZES, "seed", "policy"])
@pytest.mark.parametrize("algo", ["grpo", "online_dpo", "dpo"])
def test_what_an_algorithm_reads_from_the_run_is_no_setting_of_its_group(algo, name):
    with pytest.raises(ConfigError, match=rf"^unknown setting 'algo\.{name}'"):
        checked(with_value(chosen(algo), f"algo.{name}", 3))


@pytest.mark.parametrize("value, allowed", OUT_OF_RANGE)
@pytest.mark.parametrize("algo, name", [(algo, name) for algo, names in SIZES.items() for name in names])
def test_an_algorithms_size_out_of_range_is_refused_with_what_is_allowed(algo, name, value, allowed):
    if name in ("epochs", "minibatches", "entropy_decay_batches") and value > 0:
        allowed, value = f"at most {2**63 - 1}", 10**30
    if algo == "kto" and value <= 0:  # each completion serves another's prompt too
        allowed = "at least 2"
    with pytest.raises(ConfigError, match=rf"^algo\.{name}={value} must be {allowed}"):
        checked(with_value(chosen(algo), f"algo.{name}", value))


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_a_weight_of_kto_must_be_above_zero(name):
    with pytest.raises(ConfigError, match=rf"^algo\.{name}=0 must be above 0$"):
        checked(with_value(chosen("kto"), f"algo.{name}", 0))


@pytest.mark.parametrize("key", ["algo.samples_per_step", "algo.resample_zero_std", "algo.top_k", "algo.value_coef"])
def test_a_setting_whose_zero_is_off_may_be_zero_and_not_less(key):
    checked(with_value(defaults(), key, 0))
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}=-1 must be at least 0$"):
        checked(with_value(defaults(), key, -1))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key", ["algo.kl.coef", "algo.entropy_coef", "algo.surrogate.clip_low", "reward.sentiment.weight",
            "data.source.validation", "model.tokenizer.path", "betas[1]"],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(key, number):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}={number} must be finite$"):
        checked(with_value(defaults(), key.replace("[1]", ".1"), number))


@pytest.mark.parametrize("key", ["seed", "steps", "algo.kl.coef", "algo.epochs", "hardware.num_threads"])
def test_a_whole_number_of_thirty_digits_is_refused(key):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}=\d{{30}} must be at most {2**63 - 1} in size"):
        checked(with_value(defaults(), key, 10**29))


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb"])
@pytest.mark.parametrize("key", ["name", "run_dir", "model.path", "data.source.source", "trusted_modules"])
def test_a_text_with_a_nul_or_bytes_that_are_not_utf_8_is_refused(key, text):
    value = [text] if key == "trusted_modules" else text
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}(\[0\])?='a.*b' holds a NUL"):
        checked(with_value(defaults(), key, value))


@pytest.mark.parametrize("value", [0, 3, "x", True, 1.5, [1]])
@pytest.mark.parametrize(
    "group", ["algo", "model", "reward", "data", "hardware", "tracker", "reference", "algo.kl", "algo.kl.controller",
              "algo.probe", "algo.critic", "reward.sentiment", "data.source"],
)  # fmt: skip
def test_a_group_or_a_part_that_is_given_a_plain_value_is_refused(group, value):
    with pytest.raises(ConfigError, match=rf"^{re.escape(group)}={re.escape(repr(value))} is not a group choice"):
        checked(with_value(defaults(), group, value))


@pytest.mark.parametrize("key", ["resume", "dry_run", "profile"])
@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_a_switch_is_true_or_false_and_nothing_else(key, value):
    with pytest.raises(ConfigError, match=rf"^{key}="):
        checked(with_value(defaults(), key, value))


@pytest.mark.parametrize("key, value, message", [
    ("algo.kl._args_", [1], r"algo\.kl\._args_ cannot be set: each argument of .* is given by its name"),
    ("tracker._args_", 3, r"tracker\._args_ cannot be set"),
    ("algo.kl._partial_", 3, r"algo\.kl\._partial_=3 is a int; bool is allowed"),
])  # fmt: skip
def test_hydras_own_keys_cannot_pass_what_the_check_does_not_see(key, value, message):
    with pytest.raises(ConfigError, match=message):
        checked(with_value(defaults(), key, value))


@pytest.mark.parametrize("value", [0, "x", None, [1]])
def test_a_tokenizers_source_is_a_data_set_and_nothing_else(value):
    made = composed("model=gpt2_scratch")
    with pytest.raises(ConfigError, match=r"^model\.tokenizer\.source=.* is not a group choice"):
        checked(with_value(made, "model.tokenizer.source", value))


def test_a_key_that_is_no_name_is_refused():
    with pytest.raises(ConfigError, match=r"^algo\.kl has the key 3, which is not a name$"):
        checked(with_value(defaults(), "algo.kl", {3: 1}))


@pytest.mark.parametrize(
    "override, message",
    [
        ("schedule=cosin", "schedule=cosin must be one of constant, linear, cosine (did you mean 'cosine'?)"),
        ("patience=2", "patience=2 counts evaluations, and eval_every=0 has none"),
        ("warmup_steps=1000000", "warmup_steps=1000000 must be below steps"),
        ("betas=[0.9]", "betas=[0.9] must be two numbers in [0, 1)"),
        ("betas=[0.9,1.0]", "betas=[0.9, 1.0] must be two numbers in [0, 1)"),
        ("~steps", "steps is not set, and has no default: give steps="),
        ("~tracker", "tracker has no _target_: choose one of the files under conf/tracker/"),
        ("~algo.kl._target_", "algo.kl has no _target_: choose one of the files under conf/algo/"),
        ("~algo.entropy_coef", "algo.entropy_coef is not set, and has no default"),
        ("~data.source", "data.source is not set, and has no default"),
        ("data=prompts", "data.source.path is not set, and has no default: give data.source.path="),
    ],
)
def test_an_unknown_choice_or_a_pair_that_makes_no_sense_or_a_missing_setting_is_refused(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(override)


@pytest.mark.parametrize(
    "target", ["rlft.nope.X", "rlft.tracking.trackers.Nope", "rlft.core.paths", "builtins.dict", "3"]
)
@pytest.mark.parametrize("node", ["tracker", "algo.kl", "data.source"])
def test_a_target_that_cannot_be_called_is_refused_in_one_line_with_its_key(node, target):
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{node}._target_={target}')} cannot be used: .+$") as error:
        edited(f"{node}._target_={target}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, handed_in",
    [("algo.run", "algo.run"), ("algo.run.seed", "algo.run"), ("data.tokenizer", "data.tokenizer"),
     ("reference.policy", "reference.policy")],
)  # fmt: skip
def test_what_the_run_hands_in_cannot_be_set_and_then_ignored(key, handed_in):
    with pytest.raises(ConfigError, match=f"^{re.escape(handed_in)} cannot be set: it is handed in by the run$"):
        edited(f"{key}=3")


def test_help_names_the_groups_their_files_and_the_settings():
    result = train_py("--help")
    assert result.returncode == 0
    for file in CHOICES:
        group, name = file.rsplit("/", 1)
        assert re.search(rf"^{group}: .*\b{name}\b", result.stdout, re.MULTILINE), file
    assert re.search(r"^prompts_per_step: \d", result.stdout, re.MULTILINE)


def test_cfg_job_prints_the_resolved_configuration_and_runs_nothing():
    result = train_py("--cfg", "job", "--resolve", "algo=rloo", "group_size=3")
    assert (result.returncode, result.stderr) == (0, "")
    printed: Any = OmegaConf.to_container(OmegaConf.create(result.stdout))
    assert (printed["name"], printed["group_size"]) == ("rloo", 3)
    assert printed["model"]["tokenizer"]["path"] == printed["model"]["path"]
    assert set(printed) == set(RootConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    "typed, offered",
    [("algo=gr", ["algo=grpo"]), ("tracker=", ["tracker=none", "tracker=tensorboard", "tracker=wandb"]),
     ("prompts_", ["prompts_per_step="]), ("algo.kl.est", ["algo.kl.estimator="]),
     ("data=text data/source=s", ["data/source=shakespeare", "data/source=sort", "data/source=sums"])],
)  # fmt: skip
def test_tab_completion_offers_files_and_settings(typed, offered):
    line = f"train.py {typed}"
    result = train_py("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert (result.returncode, result.stdout.split()) == (0, offered)


@pytest.mark.parametrize(
    ("overrides", "vocab_size"),
    [
        (["model=gpt2_scratch"], 4096),
        (["model=gpt2_scratch", "model.tokenizer.vocab_size=300"], 300),
        (["model=gpt2_scratch", "model/tokenizer=gpt2"], 50257),
        (["model=gpt2_scratch", "model/tokenizer=gpt2", "model.vocab_size=50304"], 50304),
        (["model=char_scratch", "model/tokenizer=bpe", "model.vocab_size=500"], 500),
    ],
)
def test_a_fresh_model_has_the_vocabulary_of_the_tokenizer_that_is_chosen(overrides, vocab_size):
    assert config(*overrides).model["vocab_size"] == vocab_size


@pytest.mark.parametrize("name", ["bpe", "characters"])
@pytest.mark.parametrize("data", [["data=reviews"], ["data=contexts", "data/source=shakespeare"]])
def test_a_trained_tokenizer_reads_the_source_of_any_data(name, data):
    made = config("model=gpt2_scratch", f"model/tokenizer={name}", *data)
    assert made.model["tokenizer"]["source"] == made.data["source"]


def test_a_gpt2_keeps_the_tokenizer_beside_its_weights():
    assert config("model=gpt2", "model.path=/dir").model["tokenizer"]["model"] == "/dir"
    assert config("model=gpt2_scratch", "model/tokenizer=gpt2").model["tokenizer"]["model"] is None
