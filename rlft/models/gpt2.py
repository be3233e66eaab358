"""GPT-2 from scratch (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).

Learned positions, pre-norm blocks, tanh GELU, and a head tied to the token embedding. Modules keep the published names
(`wte`, `wpe`, `c_attn`, `c_proj`, `ln_f`). Two things differ from the published code: projections are `nn.Linear`, so
Conv1D weights are transposed when they are loaded or saved, and dropout is off by default (an RL update with dropout
would score another policy than the one that sampled). Attention can also go both ways, for masked diffusion: then there
is one more embedding, [MASK], which is read and never predicted.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.ranges import CountOrZero, Size
from rlft.core.rng import generator
from rlft.cpu import attention
from rlft.cpu.gelu import gelu
from rlft.models.base import CausalLM
from rlft.models.kv.base import AttentionCache, CacheShape
from rlft.models.weight_files import CONFIG_KEY, read_weights

# Published Conv1D weights are [in, out]; nn.Linear holds [out, in].
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
FEW_ROWS, MANY_WEIGHTS = 32, 100_000  # up to so many rows and from so many weights, `Linear` swaps its factors


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2; the defaults are the 124 M model's.

    `is_causal=False` lets every token attend to all others, and adds the embedding of [MASK] as id `vocab_size`.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    is_causal: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}: each head is "
                f"n_embd / n_head wide"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout must be in [0, 1), got {self.dropout}")


class Linear(nn.Linear):
    """nn.Linear, which on a CPU computes W x^T instead of x W^T for a few rows without a gradient.

    MKL packs the second factor before each product, and a few rows cost less to pack than the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_few = x.numel() <= FEW_ROWS * self.in_features and self.weight.numel() >= MANY_WEIGHTS
        if not is_few or x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        return torch.addmm(self.bias[:, None], self.weight, rows.t()).t().reshape(*x.shape[:-1], self.out_features)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.is_causal = config.is_causal

    def forward(self, x: Tensor, cache: AttentionCache | None, outputs: Tensor | None = None) -> Tensor:
        y = self.c_proj(_at(outputs, self._attend(self.c_attn(x), cache)))
        return F.dropout(y, self.dropout, self.training)

    def _attend(self, qkv: Tensor, cache: AttentionCache | None) -> Tensor:
        """Return `[B, T, C]` from queries, keys and values `[B, T, 3 C]`."""
        dropout = self.dropout if self.training else 0.0
        if cache is not None and cache.segments is not None and not dropout and attention.fits(qkv, self.n_head):
            return attention.attend(qkv.squeeze(0), cache.segments, self.n_head).unsqueeze(0)
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in qkv.split(C, dim=2))
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.is_causal and T > 1)
        else:
            y = cache.attend(self.layer, q, k, v, dropout=dropout)
        return y.transpose(1, 2).reshape(B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: AttentionCache | None, outputs: Tensor | None = None) -> Tensor:
        """Return `[B, T, C]`, or `[B, M, C]` for the M places `outputs`; the others serve as keys and values only."""
        x = _at(outputs, x) + self.attn(self.ln_1(x), cache, outputs)
        return x + self.mlp(self.ln_2(x))


def _at(places: Tensor | None, x: Tensor) -> Tensor:
    return x if places is None else x.index_select(1, places)


class GPT2(CausalLM):
    """GPT-2 with fresh weights: N(0, s), residual projections N(0, s / sqrt(2 n_layer)), biases 0.

    s is the `initializer_range`. The published 0.02 suits a width of 768; in a narrow model attention starts with next
    to no effect. A bidirectional model, which sees a hidden token's surroundings by attention alone, then predicts mere
    token frequencies for a long time; 1 / sqrt(n_embd) is the remedy.
    """

    takes_packed = True

    def __init__(self, config: GPT2Config, *, seed: int = 0, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.context_length = config.vocab_size, config.n_positions
        self.cache_shape = CacheShape(config.n_layer, config.n_head, config.n_embd // config.n_head)
        self.num_heads = config.n_head
        self.num_last_weights = 9 * config.n_embd**2 if config.is_causal else 0  # of the last block's c_proj and MLP
        self.mask_id = None if config.is_causal else config.vocab_size
        self.wte = nn.Embedding(config.vocab_size + int(not config.is_causal), config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self._initialise(seed, initializer_range)

    @classmethod
    def from_config(
        cls,
        *,
        vocab_size: Size,
        n_positions: Size,
        n_embd: Size,
        n_layer: Size,
        n_head: Size,
        dropout: float = 0.0,
        is_causal: bool = True,
        seed: CountOrZero = 0,
        initializer_range: float = 0.02,
    ) -> GPT2:
        """Build a GPT-2 with fresh weights from plain sizes (the fields of `GPT2Config`)."""
        config = GPT2Config(vocab_size, n_positions, n_embd, n_layer, n_head, dropout, is_causal=is_causal)
        return cls(config, seed=seed, initializer_range=initializer_range)

    @classmethod
    def from_pretrained(cls, path: str, *, dropout: float = 0.0) -> GPT2:
        """Load weights from a hub name, a Hugging Face directory (safetensors), or one of our checkpoints.

        Every key and every shape is checked; mask buffers of old exports are left out. Weights become float32.
        Raises `ConfigError` where nothing is found, `CheckpointError` where keys or shapes do not fit.
        """
        config, weights = read_weights(path)
        if "model_type" in config:
            if config["model_type"] != "gpt2":
                raise ConfigError(f"model.path={path} holds a '{config['model_type']}', not a GPT-2")
            config, weights = _from_hf(config, weights, path)
        model = cls(GPT2Config(**(config | {"dropout": dropout})))
        _load_checked(model, weights, path)
        return model

    @property
    def head_weight(self) -> Tensor:
        return self.wte.weight if self.mask_id is None else self.wte.weight[: self.vocab_size]

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: AttentionCache | None = None,
        outputs: Tensor | None = None,
    ) -> Tensor:
        T = input_ids.shape[1]
        if cache is not None and self.mask_id is not None:
            raise ConfigError(
                "a bidirectional model has no next-token rollout: sample it with rlft.rollout.unmask, or set "
                "model.is_causal=true"
            )
        if positions is None:
            if self.context_length < T:
                raise ValueError(f"{T} tokens do not fit the model's {self.context_length} positions")
            positions = torch.arange(T, device=input_ids.device)[None]
        x = F.dropout(self.wte(input_ids) + self.wpe(positions), self.config.dropout, self.training)
        *blocks, last = self.h
        for block in blocks:
            x = block(x, cache)
        return self.ln_f(last(x, cache, outputs))

    def config_dict(self) -> dict:
        sizes = asdict(self.config)
        if self.config.is_causal:
            del sizes["is_causal"]  # older checkpoints do not have it, are causal, and must compare equal
        return sizes

    def save_hf(self, directory: str | Path, *, eos_id: int | None = None) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.mask_id is not None:
            # transformers has no bidirectional GPT-2, and as a causal one this would silently compute something else.
            metadata = {CONFIG_KEY: json.dumps(self.config_dict())}
            save_file(self.state_dict(), directory / "policy.safetensors", metadata=metadata)
            return
        weights = {}
        for name, tensor in self.state_dict().items():
            tensor = tensor.detach().cpu()
            weights[f"transformer.{name}"] = (tensor.t() if name.endswith(_TRANSPOSED) else tensor).contiguous()
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        c = self.config
        dtype = str(self.wte.weight.dtype).removeprefix("torch.")
        same = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
        config: dict[str, object] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        config |= {"activation_function": "gelu_new"} | {name: getattr(c, name) for name in same}
        config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
        config |= {"initializer_range": 0.02, "tie_word_embeddings": True, "dtype": dtype}
        config |= {"bos_token_id": eos_id, "eos_token_id": eos_id}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _initialise(self, seed: int, initializer_range: float) -> None:
        if not initializer_range > 0:
            raise ConfigError(f"model.initializer_range must be above 0, got {initializer_range}")
        # Each parameter has a random stream of its own: weights depend on (seed, name, shape) and on nothing global.
        residual_std = initializer_range / math.sqrt(2 * self.config.n_layer)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() >= 2:
                    std = residual_std if name.endswith("c_proj.weight") else initializer_range
                    draws = generator(seed, f"init/{name}")
                    for rows in parameter.split(max(1, 2**18 // parameter[0].numel())):  # float64 for a few at a time
                        rows.copy_(torch.from_numpy(draws.standard_normal(rows.shape)) * std)
                elif name.endswith("bias"):
                    parameter.zero_()


def _from_hf(config: dict, weights: dict[str, Tensor], path: str) -> tuple[dict, dict[str, Tensor]]:
    """Translate a Hugging Face GPT-2 to our sizes and names."""
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ConfigError(f"this GPT-2 uses activation '{activation}'; only tanh GELU ('gelu_new') is implemented")
    inner = config.get("n_inner")
    is_scaled_otherwise = config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True)
    if inner not in (None, 4 * config["n_embd"]) or is_scaled_otherwise:
        raise ConfigError("only the published GPT-2 is implemented: n_inner = 4 n_embd, attention scaled by 1/sqrt(d)")
    sizes = {k: config[k] for k in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    sizes["layer_norm_epsilon"] = config.get("layer_norm_epsilon", 1e-5)
    ours = {}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        if not name.endswith(_MASK_BUFFERS):
            ours[name] = tensor.t() if name.endswith(_TRANSPOSED) else tensor
    head = ours.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in ours and not torch.equal(head, ours["wte.weight"]):
        raise CheckpointError(f"model.path={path}: lm_head.weight differs from wte.weight; this GPT-2's head is tied")
    return sizes, ours


def _load_checked(model: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(f"{path}: weights do not fit: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model needs {list(expected[name].shape)}"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
