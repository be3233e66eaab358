"""GPT-2 with attention both ways: what differs from the causal one, and what it refuses to be taken for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rlft.core.errors import ConfigError
from rlft.models.gpt2 import GPT2, GPT2Config
from rlft.models.scorer import Scorer
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from rlft.text.huggingface import huggingface
from rlft.trainer.checkpoint import Checkpoints
from tests.builders import TOKENIZER
from tests.models.tiny import random_ids, rows_of, shaken


def gpt2(seed: int = 0, *, is_causal: bool = False) -> GPT2:
    config = GPT2Config(12, 16, 16, 2, 2, is_causal=is_causal)
    return shaken(GPT2(config).double(), seed).eval()


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_later_token_changes_an_earlier_state_only_where_attention_goes_both_ways(is_causal: bool) -> None:
    policy = gpt2(is_causal=is_causal)
    ids = torch.tensor(random_ids(1, [9, 9], vocab_size=12))
    other = ids.clone()
    other[:, 6] = (ids[:, 6] + 1) % 12
    states, others = policy(ids)[:, :6], policy(other)[:, :6]
    assert torch.equal(states, others) == is_causal
    assert is_causal or float((states - others).detach().abs().amax(dim=(0, 2)).min()) > 1e-3  # every one of them


def test_without_positions_a_permuted_row_has_permuted_states() -> None:
    policy = gpt2()
    with torch.no_grad():
        policy.wpe.weight.zero_()
    ids = torch.tensor(random_ids(2, [9], vocab_size=12))
    order = torch.tensor([4, 8, 0, 3, 7, 1, 5, 2, 6])
    torch.testing.assert_close(policy(ids[:, order]), policy(ids)[:, order], rtol=0, atol=1e-12)


def test_a_single_token_has_the_causal_models_state() -> None:
    causal, both = gpt2(is_causal=True), gpt2()
    with torch.no_grad():
        both.load_state_dict(causal.state_dict() | {"wte.weight": torch.cat([causal.wte.weight, torch.ones(1, 16)])})
    ids = torch.tensor(random_ids(3, [7], vocab_size=12))
    assert torch.equal(both(ids[:, :1]), causal(ids[:, :1]))
    assert not torch.allclose(both(ids), causal(ids), atol=0.1)


def test_mask_can_be_read_and_not_predicted() -> None:
    causal, both = gpt2(is_causal=True), gpt2()
    assert (causal.mask_id, both.mask_id) == (None, 12)
    assert causal.vocab_size == both.vocab_size == len(both.head_weight) == 12
    assert both.num_parameters() - causal.num_parameters() == 16
    assert torch.equal(both.head_weight, both.wte.weight[:12])
    states = [both(torch.tensor([[3, i, 5]]))[0, 1] for i in range(13)]
    assert all(not torch.allclose(states[12], other, atol=0.01) for other in states[:12])


def test_saved_weights_come_back_to_the_same_bits_and_transformers_does_not_take_them(tmp_path: Path) -> None:
    policy = gpt2().float()
    policy.save_hf(tmp_path, eos_id=11)
    TOKENIZER.save(tmp_path)
    again = GPT2.from_pretrained(str(tmp_path))
    assert again.config == policy.config and again.mask_id == 12
    for name, tensor in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert huggingface(str(tmp_path)).encode("abk") == [0, 1, 10]
    with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_from_before_the_setting_is_causal_and_resumes(tmp_path: Path) -> None:
    policy, checkpoints = gpt2(is_causal=True).float(), Checkpoints(tmp_path, keep=1)
    optimizer = policy.configure_optimizers(learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.9))
    path = checkpoints.save(1, policy, optimizer, {}, best_step=None)
    with safe_open(path / "policy.safetensors", framework="pt") as file:
        assert "is_causal" not in json.loads(file.metadata()["config"])
    checkpoints.load(1, policy)
    assert GPT2.from_pretrained(str(path)).mask_id is None


def test_there_is_no_rollout_and_no_next_token_score() -> None:
    policy = gpt2()
    with pytest.raises(ConfigError, match="no next-token rollout"):
        generate(policy, [[1, 2]], group_size=1, sampling=Sampling(3), eos_id=None, seed=0)
    for prompt in ([1], [1, 2]):
        with pytest.raises(ConfigError, match="no next-token probabilities: train it with algo=denoise"):
            Scorer(policy)(rows_of([prompt], [[3, 4]], [0]))


def test_fresh_weights_scale_with_their_range() -> None:
    sizes = {"vocab_size": 12, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "is_causal": False}
    plain, wide = GPT2.from_config(**sizes), GPT2.from_config(**sizes, initializer_range=0.06)
    for name, weight in plain.named_parameters():
        factor = 3.0 if weight.dim() >= 2 else 1.0
        torch.testing.assert_close(wide.get_parameter(name), factor * weight, rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match=r"model\.initializer_range must be above 0, got 0\.0"):
        GPT2.from_config(**sizes, initializer_range=0.0)
