"""A reward from a model that was trained here: a checkpoint of algo=reward_model or algo=classification.

The checkpoint holds the trunk (`policy.safetensors`) and the head. The tokenizer is in its run's `model/` directory.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlft.core.batch import pad
from rlft.core.errors import CheckpointError, ConfigError, RewardError, check_choice, nearest
from rlft.core.manifest import verify
from rlft.core.ranges import Size
from rlft.models.base import CausalLM
from rlft.models.gpt2 import GPT2
from rlft.models.weight_files import checkpoint_config
from rlft.text.huggingface import huggingface

OUTPUTS = ("probability", "signed", "logit")


class RewardModel:
    """The score of the prompt followed by its completion and the end of the text.

    A model of pairs returns its score, which is unbounded and whose zero has no meaning. A classifier returns, with p
    the softmax of its logits z: `probability`, p_label in [0, 1]; `signed`, 2 p_label - 1 in [-1, 1]; or `logit`,
    z_label - log sum of the other classes' e^z, which is unbounded and so never saturates.

    Arguments:
        path: a checkpoint directory of a finished run, such as outputs/<run>/checkpoints/step_00000100.
        label: the class, for a classifier; null for a model of pairs.
        output: the value that a classifier returns; ignored for a model of pairs.
        batch_size: texts in one forward pass.
        device: a torch device, or "auto": the process's current CUDA device if there is one, else the CPU.

    Raises `ConfigError` for a checkpoint of another kind of run and for an unknown label, and `CheckpointError` for a
    damaged checkpoint.
    """

    def __init__(
        self,
        path: str,
        *,
        label: str | int | None = None,
        output: str = "probability",
        batch_size: Size = 64,
        device: str = "auto",
    ) -> None:
        check_choice(f"{_KEY}.output", output, OUTPUTS)
        if batch_size < 1:
            raise ConfigError(f"{_KEY}.batch_size={batch_size} must be at least 1")
        directory = Path(path).expanduser().absolute()
        state = _algorithm_state(directory, path)
        self.output, self.batch_size, self.device = output, batch_size, device
        self.reads_pairs = state["reads"] == "pairs"
        if self.reads_pairs and label is not None:
            raise ConfigError(f"{_KEY}.label={label}: {path} is a model of pairs, which has no classes: set it to null")
        self.index = 0 if self.reads_pairs else _index(str(label), state["classes"])
        self.tokenizer = huggingface(str(directory.parents[1] / "model"))
        self.trunk = _trunk(directory).eval().requires_grad_(False)
        head = load_file(directory / "head.safetensors")
        self.weight, self.bias = head["linear.weight"].float(), head["linear.bias"].float()  # [K, C], [K]

    @torch.inference_mode()
    def __call__(self, prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        )
        self.trunk.to(device)  # not in the constructor, because the current CUDA device is chosen after it
        rows = self._ids(prompts, completions)
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            ids, mask = pad(rows[start : start + self.batch_size], device=device)
            last = mask.sum(dim=1) - 1
            hidden = self.trunk(ids)[torch.arange(len(ids), device=device), last].float()
            scores += self._scores(hidden @ self.weight.to(device).t() + self.bias.to(device)).tolist()
        return scores

    def _ids(self, prompts: list[str], completions: list[str]) -> list[list[int]]:
        """Return the ids of the texts, encoded as in training.

        For a model of pairs, prompt and completion are encoded separately; for a classifier, the text as a whole.
        """
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        special = self.tokenizer.special_tokens
        if any(token in text for text in prompts for token in special) and self.tokenizer.hf.chat_template is not None:
            raise RewardError("a prompt was rendered by a chat template, and a reward model here reads plain text only")
        if self.reads_pairs:
            halves = zip(self.tokenizer.encode_batch(prompts), self.tokenizer.encode_batch(completions), strict=True)
            rows = [[*(prompt or end), *completion, *end] for prompt, completion in halves]
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            rows = [ids + end for ids in self.tokenizer.encode_batch(texts)]
        longest = max(range(len(rows)), key=lambda i: len(rows[i]), default=0)
        if rows and len(rows[longest]) > self.trunk.context_length:
            raise RewardError(
                f"row {longest} has {len(rows[longest])} tokens for the reward model, whose context is "
                f"{self.trunk.context_length}: lower max_new_tokens, or use shorter prompts"
            )
        return rows

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return [B] from logits [B, K]."""
        if self.reads_pairs:
            return logits[:, 0]
        p = logits.softmax(dim=1)[:, self.index]
        if self.output == "logit":
            others = torch.cat([logits[:, : self.index], logits[:, self.index + 1 :]], dim=1)
            return logits[:, self.index] - others.logsumexp(dim=1)
        return p if self.output == "probability" else 2 * p - 1


_KEY = "reward.reward_model"


def _trunk(directory: Path) -> CausalLM:
    if "model_type" not in checkpoint_config(directory / "policy.safetensors"):
        return GPT2.from_pretrained(str(directory))
    from rlft.models.hf import HFCausalLM  # imports transformers

    return HFCausalLM.from_pretrained(str(directory))


def _algorithm_state(directory: Path, path: str) -> dict:
    """Return the algorithm's state in a checkpoint, after checking that the checkpoint is complete."""
    if not directory.is_dir():
        raise ConfigError(f"{_KEY}.path={path}: there is no such directory (looked at {directory})")
    try:
        verify(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{_KEY}.path={path}: {error}") from error
    state = json.loads((directory / "state.json").read_text())["algorithm"]
    if "reads" not in state:
        raise ConfigError(f"{_KEY}.path={path} is of no run with algo=reward_model or algo=classification")
    if not (directory.parents[1] / "model").is_dir():
        raise ConfigError(
            f"{_KEY}.path={path}: its run has not finished, so that there is no {directory.parents[1] / 'model'} with "
            f"the tokenizer: go on with it by resume=true"
        )
    return state


def _index(label: str, classes: list[str]) -> int:
    if label not in classes:
        hint = nearest(label, classes)
        raise ConfigError(f"{_KEY}.label={label} must be one of the classifier's classes, {', '.join(classes)}{hint}")
    return classes.index(label)
