"""What an evaluation of an online run measures beside the rewards: the loss of held-out text."""

from __future__ import annotations

import torch

from rlft.core.errors import ConfigError
from rlft.core.ranges import Size
from rlft.data.contexts import Contexts
from rlft.data.prompts import PromptData
from rlft.models.base import CausalLM
from rlft.models.likelihood import EVAL_ROWS, mean_loss, perplexity, text_rows


class TextProbe:
    """Adds `eval/loss` and `eval/perplexity` of held-out blocks, and `eval/reference_loss`, to every evaluation."""

    def __init__(self, *, max_blocks: Size | None = 256) -> None:
        """`max_blocks` held-out blocks are read; None for all."""
        self.max_blocks = max_blocks

    def __call__(
        self, policy: CausalLM, reference: CausalLM | None, data: PromptData, *, device: torch.device
    ) -> dict[str, float]:
        """Raises `ConfigError` for data that is no running text."""
        if not isinstance(data, Contexts):
            raise ConfigError("algo/probe=text reads running text: take data=contexts")
        blocks = data.text.validation(max_blocks=self.max_blocks).to(device).split(EVAL_ROWS)
        loss = mean_loss(policy, map(text_rows, blocks))
        metrics = {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
        if reference is not None:
            metrics["eval/reference_loss"] = mean_loss(reference, map(text_rows, blocks))
        return metrics
