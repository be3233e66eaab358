from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlft.models.gpt2
from rlft.core.errors import ConfigError
from rlft.models.gpt2 import GPT2, GPT2Config
from tests.models.peer import peer, saved
from tests.models.tiny import logits_of, random_ids, tiny

SIZES = [
    # vocab_size, n_positions, n_embd, n_layer, n_head, layer_norm_epsilon
    (7, 5, 16, 1, 1, 1e-5),
    (97, 40, 32, 2, 4, 1e-5),
    (257, 65, 48, 3, 6, 1e-3),
    (131, 33, 24, 2, 3, 1e-6),
    (50257, 16, 16, 1, 2, 1e-5),
]
NAMES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
FLOAT32_BOUND, FLOAT64_BOUND = 1e-4, 1e-10


def lengths_for(n_positions: int) -> list[int]:
    return sorted({1, 2, 3, n_positions // 2, n_positions - 1, n_positions})


def assert_same_logits(ours: GPT2, theirs: torch.nn.Module, bound: float) -> None:
    """Compare over every length; the largest logits are far above the bound, so the comparison says something."""
    noise = torch.Generator().manual_seed(1)
    for length in lengths_for(ours.context_length):
        ids = torch.randint(0, ours.vocab_size, (3, length), generator=noise)
        with torch.no_grad():
            expected, got = theirs(ids).logits, logits_of(ours, ids)
        assert got.dtype == expected.dtype
        assert expected.std() > 0.5
        assert float((got - expected).abs().max()) < bound


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_agree_with_transformers(sizes: tuple, tmp_path: Path) -> None:
    theirs = peer(1, **dict(zip(NAMES, sizes, strict=True)))
    ours = GPT2.from_pretrained(saved(theirs, tmp_path))
    assert tuple(ours.config_dict()[name] for name in NAMES) == sizes
    assert_same_logits(ours, theirs, FLOAT32_BOUND)
    assert_same_logits(ours.double(), theirs.double(), FLOAT64_BOUND)


@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_transformers_loads_what_we_save(sizes: tuple, tmp_path: Path) -> None:
    for dtype, bound in ((torch.float32, FLOAT32_BOUND), (torch.float64, FLOAT64_BOUND)):
        ours = tiny(2, **dict(zip(NAMES, sizes, strict=True)), dtype=dtype)
        ours.save_hf(tmp_path / str(dtype))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype))  # in the dtype that the config names
        assert type(theirs).__name__ == "GPT2LMHeadModel"
        assert theirs.config.eos_token_id is None
        assert theirs.num_parameters() == ours.num_parameters()
        assert_same_logits(ours, theirs.eval(), bound)


def test_a_saved_policy_comes_back_to_the_same_bits(tmp_path: Path) -> None:
    policy = tiny(3, dtype=torch.float32, dropout=0.25)
    policy.save_hf(tmp_path)
    again = GPT2.from_pretrained(str(tmp_path), dropout=0.25)
    assert again.config == policy.config
    for name, tensor in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_follows_a_token_does_not_change_its_hidden_state() -> None:
    policy = tiny(4)
    ids = torch.randint(0, 19, (2, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 7:] = (ids[:, 7:] + 1) % 19
    assert torch.equal(policy(ids)[:, :7], policy(other)[:, :7])
    assert not torch.allclose(policy(ids)[:, 7:], policy(other)[:, 7:], atol=0.1)


def test_positions_are_learned_and_counted_from_zero() -> None:
    policy = tiny(5)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(policy(ids), policy(ids, positions=torch.arange(5)[None]))
    assert not torch.allclose(policy(ids), policy(ids, positions=torch.arange(1, 6)[None]), atol=0.01)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_fresh_weights_have_the_published_statistics(n_layer: int) -> None:
    policy = GPT2(GPT2Config(vocab_size=301, n_positions=64, n_embd=48, n_layer=n_layer, n_head=4), seed=1)
    for name, weight in policy.named_parameters():
        weight = weight.detach().double()
        if weight.dim() < 2:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
        # Five standard errors: of a mean std / sqrt(N), of a standard deviation std / sqrt(2 N).
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
        assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * weight.numel()), name


def test_fresh_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    config = GPT2Config(vocab_size=19, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(1)
    first = GPT2(config, seed=5)
    torch.manual_seed(2)
    again = GPT2.from_config(vocab_size=19, n_positions=8, n_embd=16, n_layer=2, n_head=2, seed=5)
    other = GPT2(config, seed=6)
    assert again.config == config
    matrices = [name for name, weight in first.named_parameters() if weight.dim() >= 2]
    for name in matrices:
        weight = first.get_parameter(name)
        assert torch.equal(weight, again.get_parameter(name)), name
        assert not torch.isclose(weight, other.get_parameter(name), rtol=0.01).all(), name
    assert not torch.equal(first.h[0].attn.c_attn.weight, first.h[1].attn.c_attn.weight)


@pytest.mark.parametrize(
    ("n_embd", "n_layer", "n_head", "expected"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 24, 16, 354_823_168),
        (1280, 36, 20, 774_030_080),
        (1600, 48, 25, 1_557_611_200),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_published_parameter_counts(
    n_embd: int, n_layer: int, n_head: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT2, "_initialise", lambda self, *_: None)  # shapes only: no numbers are drawn
    with torch.device("meta"):
        policy = GPT2(GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
    assert policy.num_parameters() == expected
    assert policy.cache_shape.num_layers == n_layer
    assert policy.cache_shape.num_kv_heads * policy.cache_shape.head_dim == n_embd


def test_each_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    policy = tiny()
    policy.wpe.requires_grad_(False)
    optimizer = policy.configure_optimizers(learning_rate=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-7)
    groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p, _ in groups}) == len(groups)
    assert {id(p) for p, _ in groups} == {id(p) for p in policy.parameters()} - {id(policy.wpe.weight)}
    for parameter, group in groups:
        assert group["weight_decay"] == (0.3 if parameter.dim() >= 2 else 0.0)
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-7)
        assert group["fused"]


def test_only_matrices_and_embeddings_shrink_without_a_gradient() -> None:
    policy = tiny(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = policy.configure_optimizers(learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in policy.named_parameters():
        expected = before[name] * (0.95 if parameter.dim() >= 2 else 1.0)  # 1 - learning rate * decay
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_dropout_is_off_unless_asked_for_and_never_in_evaluation() -> None:
    ids = torch.arange(12).reshape(2, 6)
    plain, dropping = tiny(7), tiny(7, dropout=0.4)
    expected = plain(ids)
    assert torch.equal(plain.train()(ids), expected)
    assert torch.equal(dropping.eval()(ids), expected)
    dropping.train()
    torch.manual_seed(0)
    first = dropping(ids)
    assert not torch.allclose(first, expected, atol=0.1)
    assert not torch.allclose(dropping(ids), first, atol=0.1)


def test_dropout_acts_on_embeddings_attention_weights_and_both_projections() -> None:
    x = torch.randn(4, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, dropping = tiny(8), tiny(8, dropout=0.5).train()
    torch.manual_seed(0)
    mlp, attention = dropping.h[0].mlp(x), dropping.h[0].attn(x, None)
    kept_mlp, kept_attention = mlp != 0, attention != 0
    for kept in (kept_mlp, kept_attention):
        assert 0.4 < float(kept.double().mean()) < 0.6  # 384 entries: four standard errors are 0.1
    torch.testing.assert_close(mlp[kept_mlp], 2 * plain.h[0].mlp(x)[kept_mlp])
    # What the projection's dropout kept still differs from the plain output: attention weights were dropped as well.
    assert not torch.allclose(attention[kept_attention], 2 * plain.h[0].attn(x, None)[kept_attention], atol=0.1)
    for block in dropping.h:
        block.eval()
    ids = torch.arange(6)[None]
    assert not torch.allclose(dropping(ids), plain(ids), atol=0.1)


def test_an_input_longer_than_the_context_is_refused() -> None:
    policy = tiny(n_positions=6)
    assert policy(torch.zeros(1, 6, dtype=torch.int64)).shape == (1, 6, 16)
    with pytest.raises(ValueError, match="7 tokens do not fit the model's 6 positions"):
        policy(torch.zeros(1, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_embd": 10, "n_head": 4}, r"model\.n_embd=10 must be a multiple of model\.n_head=4"),
        ({"vocab_size": 0}, r"model\.vocab_size must be at least 1, got 0"),
        ({"n_layer": 0}, r"model\.n_layer must be at least 1"),
        ({"n_head": 0}, r"model\.n_head must be at least 1"),
        ({"dropout": 1.0}, r"model\.dropout must be in \[0, 1\), got 1\.0"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2Config(**wrong)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 6)])
def test_few_rows_without_a_gradient_take_the_product_the_other_way_round(shape, monkeypatch) -> None:
    policy = tiny()
    ids = random_ids(3, [shape[0] * shape[1]])[0]
    ids = torch.tensor(ids).view(shape)
    with torch.no_grad():
        plain = policy(ids)
        calls = []
        right = torch.addmm
        monkeypatch.setattr(torch, "addmm", lambda *given: calls.append(1) or right(*given))
        monkeypatch.setattr(rlft.models.gpt2, "MANY_WEIGHTS", 1)
        torch.testing.assert_close(policy(ids), plain, rtol=0, atol=1e-12)
    assert len(calls) == 8  # four in each of two layers
    policy(ids)
    assert len(calls) == 8  # with a gradient none
