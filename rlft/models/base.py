"""The contract of every policy: trainer and rollout know a model only through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from rlft.models.kv.base import Cache, CacheShape
from rlft.models.optimizer import AdamW


class CausalLM(nn.Module, ABC):
    """A causal language model split at its head: `forward` gives hidden states, `head_weight` turns them into logits.

    So the head can be applied to completion positions only and in chunks, and `[B, T, V]` is never in memory.
    """

    vocab_size: int
    context_length: int  # the largest number of positions, prompt and completion together
    cache_shape: CacheShape
    num_heads: int  # query heads of a layer; several may share a key/value head of `cache_shape`
    takes_packed: bool = False  # whether any `AttentionCache` will do, so that rows can be forwarded without padding
    num_last_weights: int = 0  # in the matrices after the last attention, which read the places `outputs` only
    mask_id: int | None = None  # the id of a hidden token, where attention goes both ways; None: it is causal

    @abstractmethod
    def forward(self, input_ids: Tensor, *, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Return the hidden states before the head, `[B, T, C]`, for `input_ids` `[B, T]` int64.

        `positions` is int64 `[B, T]` (or `[1, T]`), 0, 1, 2, … in each row by default. Rows are right-padded, and
        causal attention hides the padding from a row's tokens: no padding mask is needed.

        A model that `takes_packed` also takes `outputs`, int64 `[M]` (all places by default): the places whose states
        are wanted. It then returns `[B, M, C]`.
        """

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The output embedding `[V, C]`: logits are `hidden @ head_weight.T`."""

    @abstractmethod
    def config_dict(self) -> dict:
        """The plain values that rebuild the same architecture; stored in every checkpoint."""

    @abstractmethod
    def save_hf(self, directory: str | Path, *, eos_id: int | None = None) -> None:
        """Write config and weights in Hugging Face format, so that `AutoModelForCausalLM` gives the same logits.

        `eos_id` is the tokenizer's end-of-text token, at which transformers' `generate` stops. A bidirectional model
        has no class there, and is written as one of our checkpoints instead: `policy.safetensors` alone.
        """

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def configure_optimizers(
        self,
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        head: nn.Module | None = None,
        head_scale: float = 1.0,
    ) -> torch.optim.AdamW:
        """Return AdamW, fused where available; matrices and embeddings have weight decay, biases and norms none.

        A `head` that is trained beside the policy has groups of its own, at `head_scale` times the learning rate (each
        group's `scale`).
        """
        groups, trained = [], []
        for module, scale in ((self, 1.0), (head, head_scale)):
            parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
            matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
            for params, decay in ((matrices, weight_decay), (others, 0.0)):
                if params:
                    groups.append({"params": params, "weight_decay": decay, "scale": scale})
            trained += parameters
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
        return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
