from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlft.core.errors import CheckpointError, ConfigError
from rlft.models.gpt2 import GPT2
from rlft.trainer.checkpoint import Checkpoints
from tests.models.peer import peer, saved
from tests.models.tiny import logits_of, tiny

IDS = torch.arange(18).reshape(3, 6)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face GPT-2 on disk."""
    return Path(saved(peer(), tmp_path / "hf"))


def rewrite(directory: Path, change: Any) -> dict[str, Tensor]:
    """Replace the weights by `change(weights)`; returns what is on disk then."""
    weights = change(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
    return weights


def reconfigure(directory: Path, **changed: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def assert_gives_the_peers_logits(path: Path) -> None:
    with torch.no_grad():
        got = logits_of(GPT2.from_pretrained(str(path)), IDS)
        torch.testing.assert_close(got, peer()(IDS).logits, rtol=0, atol=1e-4)


def test_a_directory_with_one_file(directory: Path) -> None:
    assert_gives_the_peers_logits(directory)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_old_exports_with_mask_buffers_with_or_without_prefix_and_head(directory: Path, prefix: str) -> None:
    def old(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {prefix + name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        for layer in range(2):
            renamed[f"{prefix}h.{layer}.attn.bias"] = torch.ones(24, 24).tril()[None, None]
            renamed[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return renamed | {"lm_head.weight": renamed[f"{prefix}wte.weight"].clone()}

    assert "lm_head.weight" in rewrite(directory, old)
    assert_gives_the_peers_logits(directory)


def test_sharded_weights(tmp_path: Path) -> None:
    path = Path(saved(peer(), tmp_path, max_shard_size="8KB"))
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_gives_the_peers_logits(path)
    shard = min(path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} is missing"):
        GPT2.from_pretrained(str(path))


def test_float16_weights_become_float32_exactly(directory: Path) -> None:
    half = rewrite(directory, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    policy = GPT2.from_pretrained(str(directory))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert torch.equal(policy.wte.weight, half["transformer.wte.weight"].float())
    assert torch.equal(policy.h[1].mlp.c_fc.weight, half["transformer.h.1.mlp.c_fc.weight"].float().t())


def test_one_of_our_checkpoints(tmp_path: Path) -> None:
    policy = tiny(3, dtype=torch.float32, layer_norm_epsilon=1e-4)
    optimizer = policy.configure_optimizers(learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    path = Checkpoints(tmp_path, keep=1).save(7, policy, optimizer, {}, best_step=None)
    loaded = GPT2.from_pretrained(str(path))
    assert loaded.config == policy.config
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # float32 with logits of several nats
    torch.testing.assert_close(logits_of(loaded, IDS), logits_of(policy, IDS), rtol=0, atol=1e-5)
    assert GPT2.from_pretrained(str(path), dropout=0.5).config.dropout == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: t for k, t in w.items() if k != "transformer.ln_f.bias"}, r"missing \['ln_f\.bias'\]"),
        (lambda w: w | {"transformer.h.2.ln_1.bias": torch.zeros(16)}, r"unknown \['h\.2\.ln_1\.bias'\]"),
        (lambda w: w | {"score.weight": torch.zeros(2, 16)}, r"unknown \['score\.weight'\]"),
        (
            lambda w: w | {"transformer.wte.weight": torch.zeros(20, 16)},
            r"wte\.weight has shape \[20, 16\], the model needs \[19, 16\]",
        ),
        (
            lambda w: w | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 16)},  # [out, in]: not a Conv1D's
            r"h\.0\.mlp\.c_fc\.weight has shape \[16, 64\], the model needs \[64, 16\]",
        ),
        (lambda w: w | {"lm_head.weight": torch.zeros(19, 16)}, r"lm_head\.weight differs from wte\.weight"),
    ],
    ids=["missing key", "unknown layer", "unknown head", "other vocabulary", "not transposed", "untied head"],
)
def test_weights_that_do_not_fit_are_refused(directory: Path, change: Any, message: str) -> None:
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        GPT2.from_pretrained(str(directory))
    assert str(directory) in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama"}, "holds a 'llama', not a GPT-2"),
        ({"activation_function": "relu"}, r"activation 'relu'; only tanh GELU \('gelu_new'\)"),
        ({"activation_function": "gelu"}, "activation 'gelu'"),  # the exact GELU is another function
        ({"n_inner": 40}, "n_inner = 4 n_embd"),
        ({"scale_attn_by_inverse_layer_idx": True}, "attention scaled by"),
        ({"scale_attn_weights": False}, "attention scaled by"),
    ],
    ids=str,
)
def test_another_architecture_is_refused(directory: Path, changed: dict, message: str) -> None:
    reconfigure(directory, **changed)
    with pytest.raises(ConfigError, match=message):
        GPT2.from_pretrained(str(directory))


def test_equivalent_spellings_of_the_configuration_are_taken(directory: Path) -> None:
    reconfigure(directory, activation_function="gelu_pytorch_tanh", n_inner=64)
    assert_gives_the_peers_logits(directory)


def test_a_pickle_is_never_read(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing \(only safetensors are read, never pickles"):
        GPT2.from_pretrained(str(directory))


def test_a_file_that_is_no_safetensors_is_named(directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (directory / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"hf/model\.safetensors"):
        GPT2.from_pretrained(str(directory))


def test_a_checkpoint_of_someone_elses_is_refused(tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "policy.safetensors")  # no metadata: the model's sizes are not known
    with pytest.raises(CheckpointError, match=r"policy\.safetensors"):
        GPT2.from_pretrained(str(tmp_path))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither policy\.safetensors .* nor config\.json"):
        GPT2.from_pretrained(str(tmp_path))


def test_without_a_hub_the_error_names_the_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as raised:
        GPT2.from_pretrained("nobody/no-such-model")
    for part in ("model.path=nobody/no-such-model", "hub", "model.path=/dir", "model.safetensors", "model=tiny"):
        assert part in str(raised.value)


def test_a_local_path_that_does_not_exist_is_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        GPT2.from_pretrained(str(tmp_path / "absent"))
