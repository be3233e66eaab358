"""Models of `transformers` behind our contract, against the same models called as `transformers` calls them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from rlft.core.errors import CheckpointError, ConfigError
from rlft.models.hf import HFCausalLM
from rlft.models.scorer import Scorer
from rlft.references.frozen import checkpoint, initial
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from rlft.trainer.checkpoint import Checkpoints
from tests.builders import TOKENIZER

SIZES = {
    "vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "bos_token_id": 11, "eos_token_id": 11, "pad_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama, grouped heads": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3, wide heads": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "mistral, a window of 20": transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20),
    "gemma": transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8),
    "gpt-neox": transformers.GPTNeoXConfig(**SIZES),
    "gpt2": transformers.GPT2Config(
        vocab_size=13, n_positions=24, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3
    ),
}


def theirs(name: str = "llama, grouped heads", *, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").eval()


@pytest.fixture(params=CONFIGS)
def model(request):
    return theirs(request.param)


def rollout_of(policy, **settings):
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    return generate(policy, prompts, group_size=3, sampling=Sampling(6, temperature=0.8), eos_id=11, seed=3, **settings)


def test_rollout_and_update_have_the_models_own_logprobs(model):
    policy = HFCausalLM(model.double())
    rollout = rollout_of(policy)
    scores = Scorer(policy)(rollout.rows, temperature=0.8)
    lengths = {len(ids) for ids in rollout.completions()}
    assert len(lengths) > 1 or lengths == {6}
    for row, completion in enumerate(rollout.completions()):
        prompt = [[1, 2, 3, 4, 5], [6], [7, 8]][row // 3]
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        # float64, but for what a model itself computes in float32 (norms, rotary angles): then both do the same
        for ours in (rollout.logprobs[row], scores.logprobs[row]):
            torch.testing.assert_close(ours[: len(completion)], expected, atol=1e-6, rtol=0.0)
    assert float(scores.logprobs[scores.logprobs != 0].detach().std()) > 0.3


def test_nothing_that_is_called_is_on_its_way_out_of_transformers(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout_of(HFCausalLM(model))


def test_the_shared_prompt_gives_the_gradient_of_rows_alone():
    model = theirs().double()
    policy = HFCausalLM(model)
    rollout = rollout_of(policy)
    Scorer(policy)(rollout.rows).logprobs.sum().backward()
    shared = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, completion in enumerate(rollout.completions()):
        prompt = [[1, 2, 3, 4, 5], [6], [7, 8]][row // 3]
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum().backward()
    for name, parameter in model.named_parameters():
        # gradients of some tens; rotary angles and norms are float32 inside the model
        torch.testing.assert_close(shared[name], parameter.grad, atol=1e-5, rtol=1e-5)


def test_dropout_is_off_unless_asked_for():
    config = copy.deepcopy(CONFIGS["llama, grouped heads"])
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    ids = torch.arange(8)[None]
    off, on = HFCausalLM(copy.deepcopy(model)).train(), HFCausalLM(copy.deepcopy(model), dropout=0.5).train()
    assert torch.equal(off(ids), off(ids)) and not torch.equal(on(ids), on(ids))


def test_a_window_is_the_context(model):
    is_mistral = model.config.model_type == "mistral"
    assert HFCausalLM(model).context_length == (20 if is_mistral else 24)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MambaConfig(vocab_size=13, hidden_size=16, num_hidden_layers=1, state_size=4), "cannot be"),
        (transformers.PhiConfig(**SIZES), "its head is no matrix without a bias"),
        (transformers.GraniteConfig(**SIZES, logits_scaling=8.0), "differ from its own by"),
        (
            transformers.FalconConfig(
                vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, alibi=True
            ),
            "cannot",
        ),
        (
            transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, router_jitter_noise=0.1),
            "draws noise of its own",
        ),
    ],
    ids=["no attention", "a bias", "scaled logits", "alibi", "noise"],
)
def test_what_cannot_be_called_as_rollout_does_is_refused(config, message):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=message):
        HFCausalLM(AutoModelForCausalLM.from_config(config))


def test_angles_that_change_with_the_longest_row_end_the_context():
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "rope_theta": 1e4}
    sizes = SIZES | {"max_position_embeddings": 64, "pad_token_id": 0}
    config = transformers.Phi3Config(**sizes, original_max_position_embeddings=16, rope_parameters=rope)
    torch.manual_seed(0)
    assert HFCausalLM(AutoModelForCausalLM.from_config(config)).context_length == 16


def test_sampling_defaults_that_transformers_refuses_do_not_stop_an_export(tmp_path):
    model = theirs()
    model.generation_config.temperature = 0.6  # without do_sample, as some published directories have it
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "theirs")
    HFCausalLM(model).save_hf(tmp_path / "ours", eos_id=11)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config.eos_token_id == 11


def test_a_checkpoint_without_the_layers_is_refused_and_so_is_a_damaged_file(tmp_path):
    policy, optimizer = HFCausalLM(theirs()), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    saved = Checkpoints(tmp_path, keep=1).save(1, policy, optimizer, {}, best_step=None)
    file = saved / "policy.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata, head = opened.metadata(), {"head.weight": opened.get_tensor("head.weight")}
    save_file(head, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="does not fit its own config"):
        HFCausalLM.from_pretrained(str(saved))
    file.write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match="damaged"):
        HFCausalLM.from_pretrained(str(saved))


def test_checkpoint_and_export_hold_the_same_model(model, tmp_path):
    policy = HFCausalLM(model)
    optimizer = policy.configure_optimizers(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    policy(torch.arange(8)[None]).square().sum().backward()
    optimizer.step()
    saved = Checkpoints(tmp_path / "checkpoints", keep=1).save(1, policy, optimizer, {}, best_step=None)
    policy.save_hf(tmp_path / "model", eos_id=5)
    ids = torch.randint(0, 13, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = policy(ids) @ policy.head_weight.T
        for path in (saved, tmp_path / "model"):
            loaded = HFCausalLM.from_pretrained(str(path))
            for name, tensor in policy.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor), name
            torch.testing.assert_close(loaded(ids) @ loaded.head_weight.T, logits, atol=1e-5, rtol=0.0)  # float32
            assert loaded.config_dict() == policy.config_dict() or path != saved
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(exported(ids).logits, logits, atol=1e-5, rtol=0.0)  # float32
    assert exported.config.eos_token_id == 5


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    policy, optimizer = HFCausalLM(theirs()), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    Checkpoints(tmp_path, keep=1).save(1, policy, optimizer, {}, best_step=None)
    with pytest.raises(CheckpointError, match="does not fit the configured model"):
        Checkpoints(tmp_path, keep=1).load(1, HFCausalLM(theirs("qwen2")))


def test_references_of_such_a_policy(tmp_path):
    policy = HFCausalLM(theirs())
    frozen = initial(policy)
    ids = torch.arange(8)[None]
    before = frozen(ids).clone()
    policy.save_hf(tmp_path / "model")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    assert torch.equal(frozen(ids), before) and not torch.equal(policy(ids), before)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    torch.testing.assert_close(checkpoint(policy, tokenizer=TOKENIZER, path=str(tmp_path / "model"))(ids), before)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded as a causal model"):
        HFCausalLM.from_pretrained(str(tmp_path))
