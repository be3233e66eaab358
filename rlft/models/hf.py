"""Any causal model of Hugging Face's `transformers`, behind the contract that rollout and update know (`base.py`).

The model keeps its own layers; only its cache is ours, so that here too a prompt is forwarded once for its whole group.
The model is always given an explicit 4-D mask and position ids, which models that follow Llama's or GPT-2's code take.
This is tried once, when a model is loaded: called as rollout and update call it, it must give its own logits, or it is
refused.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from rlft.core.batch import Rows
from rlft.core.errors import CheckpointError, ConfigError, RlftError
from rlft.models.base import CausalLM
from rlft.models.kv.base import Cache, CacheShape
from rlft.models.kv.copied import DecodeCache
from rlft.models.rows import predictors, prefill
from rlft.models.weight_files import checkpoint_config, local_directory

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "architectures")  # do not decide the architecture
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
logging.disable_progress_bar()  # it would write into the run's own display
ALLOWED_DIFFERENCE = 1e-3  # between the adapter's logits and the model's own, in standard deviations of these, float32


class HFCausalLM(CausalLM):
    """A `transformers` causal model; its own code may be slower than `GPT2`, and nothing else differs.

    Dropout is off unless asked for. Where layers attend within a window, `context_length` is at most the window:
    within it they attend to everything.
    """

    whole: PreTrainedModel
    base: Any  # the layers, without the head

    def __init__(self, model: PreTrainedModel, *, dropout: float = 0.0) -> None:
        """Raises `ConfigError` for a model that cannot be called as rollout and update do."""
        super().__init__()
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise ConfigError(f"{type(model).__name__} cannot be used: its head is no matrix without a bias")
        self.base = model.base_model
        # The argument's name: transformers renamed it in 5.24, model by model, and accepts the old one up to 5.40.
        self._cache = "cache" if "cache" in inspect.signature(self.base.forward).parameters else "past_key_values"
        is_tied = head.weight is self.base.get_input_embeddings().weight
        self.head: nn.Module | None = None if is_tied else head
        # Kept for its config and `save_pretrained`, but not as a submodule, which would name every weight twice.
        object.__setattr__(self, "whole", model)
        _set_dropout(self.base, dropout)
        # rlft does the sampling: a model's own defaults are dropped, as transformers refuses to save some of them.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        self.vocab_size = head.weight.shape[0]
        self.context_length, self.num_heads = _context_length(config), config.num_attention_heads
        self.cache_shape = CacheShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or self.num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // self.num_heads,
        )
        _check(self, model, dropout=dropout)

    @classmethod
    def from_pretrained(cls, path: str, *, dropout: float = 0.0) -> HFCausalLM:
        """Load a hub name, a Hugging Face directory, or one of our checkpoints of such a model, in float32.

        Only safetensors are read, and no code that comes with a model is run. Raises `ConfigError` where nothing is
        found or the architecture cannot be used, `CheckpointError` for weights that do not fit.
        """
        directory = local_directory(path)
        try:
            if (directory / "policy.safetensors").is_file():
                return cls(_from_checkpoint(directory / "policy.safetensors"), dropout=dropout)
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
            )
        except RlftError:
            raise
        except SafetensorError as error:
            raise CheckpointError(
                f"{directory} holds a damaged safetensors file (a Git LFS pointer?): {error}"
            ) from error
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            why = " ".join(str(error).split())[:300]
            raise ConfigError(f"model.path={path} cannot be loaded as a causal model: {why}") from error
        return cls(model, dropout=dropout)

    @property
    def head_weight(self) -> Tensor:
        head: Any = self.base.get_input_embeddings() if self.head is None else self.head
        return head.weight

    def forward(self, input_ids: Tensor, *, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        B, T = input_ids.shape
        if positions is None:
            if self.context_length < T:
                raise ValueError(f"{T} tokens do not fit the model's {self.context_length} positions")
            positions = torch.arange(T, device=input_ids.device)[None]
        mask = cache.mask(T) if cache is not None else None
        if mask is None:  # a single new token sees all slots; several see each other causally
            mask = torch.ones(1, 1, T, T + (cache.used if cache else 0), dtype=torch.bool, device=input_ids.device)
            mask = mask if T == 1 else mask.tril()
        return self.base(
            input_ids=input_ids,
            attention_mask=mask.expand(B, -1, -1, -1),
            position_ids=positions.expand(B, -1),
            use_cache=cache is not None,
            **{self._cache: None if cache is None else _Bridge(cache)},
        ).last_hidden_state

    def config_dict(self) -> dict:
        values = json.loads(self.whole.config.to_json_string(use_diff=False))
        return {name: value for name, value in values.items() if name not in _VOLATILE}

    def save_hf(self, directory: str | Path, *, eos_id: int | None = None) -> None:
        configs = [config for config in (self.whole.config, self.whole.generation_config) if config is not None]
        before = [config.eos_token_id for config in configs]
        try:
            for config in configs:
                config.eos_token_id = config.eos_token_id if eos_id is None else eos_id
            self.whole.save_pretrained(directory)
        finally:  # the run may go on, and its checkpoints hold the config
            for config, eos in zip(configs, before, strict=True):
                config.eos_token_id = eos


class _Bridge:
    """Our cache with the methods that a `transformers` model's attention layers call."""

    is_compileable = False

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.cache.extend(layer, keys, values)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.cache.used


def _from_checkpoint(file: Path) -> PreTrainedModel:
    config = checkpoint_config(file)
    if "model_type" not in config:
        raise ConfigError(f"{file} is a checkpoint of another model: take model=gpt2 model.path=…")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="sdpa"
    )
    weights = load_file(file)
    named = {"base": model.base_model}
    if any(name.startswith("head.") for name in weights):  # there are none where the head is the token embedding
        named["head"] = model.get_output_embeddings()
    for prefix, module in named.items():
        own = {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name.startswith(f"{prefix}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(f"{file} does not fit its own config: {error}") from error
    return model


def _context_length(config: PreTrainedConfig) -> int:
    """Return the number of positions, or the narrowest window of any layer where that is less."""
    length = getattr(config, "max_position_embeddings", None)
    if length is None or not hasattr(config, "num_attention_heads"):
        raise ConfigError(f"{config.model_type} cannot be used: its config names no positions or no attention heads")
    types = set(getattr(config, "layer_types", None) or ())
    unknown = types - {"full_attention", *_WINDOWS}
    if unknown:
        raise ConfigError(f"{config.model_type} cannot be used: it has layers of {', '.join(sorted(unknown))}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this length all angles depend on a call's longest row
        length = min(length, rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    windows = [getattr(config, _WINDOWS[kind], None) for kind in types if kind in _WINDOWS]
    if not types and getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    return min([length, *(window for window in windows if window)])


def _set_dropout(model: nn.Module, p: float) -> None:
    """Set every dropout: of modules, and the numbers that layers or their config pass to a kernel."""
    for module in (*model.modules(), model.config):
        if isinstance(module, nn.Dropout):
            module.p = p
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, p)


@torch.no_grad()
def _check(adapter: HFCausalLM, model: PreTrainedModel, *, dropout: float) -> None:
    """Compare the adapter's logits with the model's own, for an update and for decoding, and refuse random noise."""
    was_training = model.training
    model.eval()
    draws = torch.Generator().manual_seed(0)
    device = adapter.head_weight.device
    prompts, completions = (torch.randint(0, adapter.vocab_size, s, generator=draws) for s in ((2, 5), (4, 3)))
    lengths, prompt_of_row = torch.tensor([5, 2]), torch.tensor([0, 0, 1, 1])
    rows = Rows(prompts, lengths, prompt_of_row, completions, torch.ones(4, 3, dtype=torch.bool)).to(device)
    try:
        own = []
        for row in range(4):
            prompt = rows.prompt_ids[prompt_of_row[row], : lengths[prompt_of_row[row]]]
            whole = torch.cat([prompt, rows.completion_ids[row]])[None]
            own.append(model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float())
        shared = predictors(adapter, rows).view(4, 3, -1)
        stepped = _stepped(adapter, rows)
        head, expected = adapter.head_weight.T, torch.stack(own)
        scale = expected.std()
        differences = [float(((x @ head).float() - expected).abs().max() / scale) for x in (shared, stepped)]
        still = adapter(rows.prompt_ids)
        is_noisy = not dropout and not torch.equal(adapter.train()(rows.prompt_ids), still)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError, KeyError) as error:
        name = type(model).__name__
        raise ConfigError(f"{name} cannot be called as rollout and update do: {error}") from error
    finally:
        adapter.train(was_training)
    if is_noisy:
        raise ConfigError(f"{type(model).__name__} cannot be used: it draws noise of its own while it trains")
    if not all(difference < ALLOWED_DIFFERENCE for difference in differences):
        raise ConfigError(
            f"{type(model).__name__} cannot be used: through rlft's cache and head its logits differ from its own by "
            f"{max(differences):.1e} standard deviations (it may scale its logits, or place tokens in a way of its own)"
        )


def _stepped(policy: HFCausalLM, rows: Rows) -> Tensor:
    """Return the states that predict the completions, `[B, T, C]`, token by token as rollout computes them."""
    last, prefix = prefill(policy, rows.prompt_ids, rows.prompt_lengths)
    states, positions = [last[rows.prompt_of_row]], rows.prompt_lengths[rows.prompt_of_row]
    num_new = rows.completion_ids.shape[1]
    cache = DecodeCache(prefix, rows.prompt_of_row, max_new_tokens=num_new, shape=policy.cache_shape)
    for t in range(num_new - 1):
        token = rows.completion_ids[:, t : t + 1]
        states.append(policy(token, positions=(positions + t)[:, None], cache=cache)[:, 0])
    return torch.stack(states, dim=1)
