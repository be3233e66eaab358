"""References from a seed and from a path, and each of them through conf/ and rlft/build.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from rlft import build
from rlft.config import checked
from rlft.core.batch import Denominators
from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.metrics import Metrics
from rlft.models.gpt2 import GPT2
from rlft.models.scorer import Scorer
from rlft.references.bigram import Bigram
from rlft.references.frozen import checkpoint, random
from rlft.text.characters import characters
from rlft.trainer.checkpoint import Checkpoints
from tests.builders import ALPHABET, CONF, TOKENIZER, tiny

IDS = torch.arange(12)[None]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def is_frozen(model: torch.nn.Module) -> bool:
    return not model.training and not any(p.requires_grad for p in model.parameters())


def saved(model: GPT2, directory: Path, tokenizer: Any = None) -> str:
    model.save_hf(directory)
    if tokenizer is not None:
        tokenizer.save(directory)
    return str(directory)


def test_a_random_reference_has_the_policys_architecture_and_its_seeds_weights():
    policy = tiny(0, spread=0.2, n_layer=2).double()
    model = random(policy, seed=5)
    assert isinstance(model, GPT2) and model.config == policy.config and is_frozen(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert same_weights(model, GPT2(policy.config, seed=5).double()) and not same_weights(model, random(policy, seed=6))
    assert same_weights(policy, tiny(0, spread=0.2, n_layer=2).double()) and policy.wte.weight.requires_grad


def test_a_random_reference_of_the_policys_own_seed_is_refused():
    random(tiny(5, spread=0.1), seed=5)  # trained since
    with pytest.raises(ConfigError, match=r"reference\.seed=5 gives the policy's own weights"):
        random(tiny(5), seed=5)


def test_a_random_reference_of_another_architecture_is_refused():
    table = Bigram(torch.zeros(12, 12), context_length=32)
    with pytest.raises(ConfigError, match="draws the weights of a GPT-2, and the policy is a Bigram"):
        random(table, seed=5)


@pytest.mark.parametrize("kind", ["checkpoint", "directory", "directory with its tokenizer"])
def test_a_reference_from_a_path_has_that_models_weights(kind, tmp_path):
    policy, other = tiny(0).double(), tiny(1, spread=0.2, n_layer=2, n_positions=40)
    if kind == "checkpoint":
        optimizer = other.configure_optimizers(learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.99))
        path = str(Checkpoints(tmp_path, keep=1).save(3, other, optimizer, {}, best_step=None))
    else:
        path = saved(other, tmp_path, TOKENIZER if "tokenizer" in kind else None)
    model = checkpoint(policy, tokenizer=TOKENIZER, path=path)
    assert same_weights(model, other.double()) and is_frozen(model)
    assert model.head_weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 13}, "has a vocabulary of 13, the policy one of 12"),
        ({"n_positions": 31}, "has 31 positions, the policy 32"),
    ],
)
def test_a_reference_of_other_sizes_is_refused(sizes, message, tmp_path):
    plain = {"vocab_size": 12, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    path = saved(GPT2.from_config(**(plain | sizes)), tmp_path)
    with pytest.raises(ConfigError, match=rf"reference\.path={path} {message}"):
        checkpoint(tiny(), tokenizer=TOKENIZER, path=path)


def test_a_reference_with_as_many_but_other_tokens_is_refused(tmp_path):
    path = saved(tiny(), tmp_path, characters(alphabet=ALPHABET[1:] + "z"))
    with pytest.raises(ConfigError, match=r"another tokenizer than the policy \(they differ in 12 tokens, as in 'a'\)"):
        checkpoint(tiny(), tokenizer=TOKENIZER, path=path)


def test_a_path_that_holds_no_model_is_named_as_the_references(tmp_path):
    with pytest.raises(ConfigError, match=r"^reference\.path=.*neither policy\.safetensors"):
        checkpoint(tiny(), tokenizer=TOKENIZER, path=str(tmp_path))
    saved(tiny(), tmp_path)
    untied = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": torch.zeros(12, 16)}
    save_file(untied, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"^reference\.path=.*lm_head\.weight differs"):
        checkpoint(tiny(), tokenizer=TOKENIZER, path=str(tmp_path))


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job that is built from conf/: a small GPT-2 over characters, prompts from a file, a reward of length."""
    monkeypatch.setenv("RLFT_CACHE", str(tmp_path / "cache"))
    words = ["good bad dull", "dull good", "bad film", "a film so good", "so so film", "a dull dull day", "all bad"]
    lines = [json.dumps({"prompt": f"{a}, {b}"}) + "\n" for a in words for b in words if a != b]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    overrides = [
        "name=test", "model=gpt2_scratch", "model.vocab_size=32", "model.n_positions=24", "model.n_embd=8",
        "model.n_layer=1", "model.n_head=2", "model.tokenizer._target_=rlft.text.characters.characters",
        "~model.tokenizer.vocab_size", "data=prompts", f"data.source.path={tmp_path}/texts.jsonl",
        "data.prompt_tokens=3", "data.source.validation=0.2", "reward=length", "prompts_per_step=2", "group_size=3",
        "max_new_tokens=6", "eval_prompts=4", "hardware=cpu", "hardware.num_threads=1", "tracker=none",
    ]  # fmt: skip

    def make(*more: str) -> build.Job:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return build.build(checked(compose("train", overrides=[*overrides, *more])))

    return make


def test_every_reference_is_built_from_its_file_and_measures_a_kl(job, tmp_path):
    path = saved(GPT2.from_config(vocab_size=32, n_positions=24, n_embd=4, n_layer=1, n_head=1, seed=9), tmp_path / "m")
    kl = {}
    for choice in (["bigram"], ["random"], ["initial"], ["checkpoint", f"reference.path={path}"]):
        made = job(f"reference={choice[0]}", *choice[1:])
        algorithm: Any = made.algorithm
        batch, means = algorithm.collect(0), Metrics()
        totals = Denominators(num_tokens=batch.num_tokens, num_sequences=batch.num_rows)
        assert algorithm.loss(Scorer(made.run.policy), batch, totals, means, update=0).isfinite()
        kl[choice[0]] = means.local()["kl_exact"]
        assert algorithm.evaluate().metrics["eval/kl"] == pytest.approx(kl[choice[0]], abs=0.5)
    assert kl["initial"] == pytest.approx(0.0, abs=1e-6)
    assert kl["bigram"] > 1.0 and min(kl["random"], kl["checkpoint"]) > 1e-4  # what is fresh is close to uniform


def test_the_bigram_of_a_run_is_counted_from_whole_texts_not_from_openings(job):
    made = job("reference=bigram", "reference.alpha=0.001")
    reference: Any = made.run.reference
    ids = made.run.tokenizer.encode("go")
    assert float(reference.log_probs[ids[0], ids[1]].exp()) == pytest.approx(1.0, abs=0.01)  # "g" stands in "good" only
    film = made.run.tokenizer.encode("lm")
    assert float(reference.log_probs[film[0], film[1]].exp()) > 0.1  # within texts, never in an opening of 3


def test_what_the_run_hands_to_a_reference_is_refused_as_a_setting(job):
    for key in ("policy", "data", "tokenizer"):
        with pytest.raises(ConfigError, match=rf"reference\.{key} cannot be set"):
            job(f"+reference.{key}=3")
