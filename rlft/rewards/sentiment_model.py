"""A reward from a text classifier in Hugging Face format, with its own tokenizer; by default DistilBERT on SST-2.

Only safetensors are loaded, and no code that comes with a model is run.
"""

from __future__ import annotations

from typing import Any

import torch

from rlft.core.errors import ConfigError, RewardError, nearest
from rlft.core.paths import resolve
from rlft.core.ranges import Size
from rlft.text.huggingface import load_errors

SST2 = "distilbert-base-uncased-finetuned-sst-2-english"
OUTPUTS = ("probability", "logit", "signed")
ON_LONG = ("error", "truncate")


class SentimentModel:
    """The classifier's score of `label` for the completion, without its prompt.

    With p the softmax (for a multi-label model, the sigmoid) of the logits z, in float32, it is: `probability`, p_label
    in [0, 1]; `signed`, 2 p_label - 1 in [-1, 1]; or `logit`, z_label, which is unbounded and so never saturates. A
    model with one output, such as a reward model, has only `logit`.

    The rows of a batch are padded, and the attention mask hides the padding. Beyond float32 rounding, a score depends
    neither on the batch size nor on the other rows.
    """

    def __init__(
        self,
        path: str = SST2,
        *,
        label: str = "POSITIVE",
        output: str = "probability",
        batch_size: Size = 64,
        on_long: str = "error",
        device: str = "auto",
    ) -> None:
        """Arguments:

        path: a directory in Hugging Face format, `package:<package>/<directory>`, or a hub name.
        label: one of the names in the model's `id2label`.
        output: "probability", "logit" or "signed".
        batch_size: completions in one forward pass.
        on_long: what happens to a completion of more tokens than the model allows: "error", or "truncate" to its first
            tokens.
        device: a torch device, or "auto": the process's current CUDA device if there is one, else the CPU.

        Raises `ConfigError` for a value that is not allowed (if possible, before the weights are read), and for a model
        that cannot be loaded or has no trained classification head.
        """
        for key, value, allowed in (("output", output, OUTPUTS), ("on_long", on_long, ON_LONG)):
            if value not in allowed:
                raise _refused(key, value, f"must be one of {', '.join(allowed)}{nearest(str(value), allowed)}")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise _refused("batch_size", batch_size, "must be a whole number of completions, at least 1")
        try:
            self._device = None if device == "auto" else torch.device(device)
        except RuntimeError as error:
            raise _refused("device", device, "must be auto, cpu, cuda or cuda:<index>") from error
        found = str(resolve(path))
        config, self.tokenizer = _load_config_and_tokenizer(path, found)
        self._index = _index_of(label, config)
        if config.num_labels == 1 and output != "logit":
            raise _refused("output", output, "must be logit, because this model has one output and no probabilities")
        if batch_size > 1 and self.tokenizer.pad_token_id is None:
            raise _refused("batch_size", batch_size, "must be 1, because this model's tokenizer has no padding token")
        self._is_multi_label = config.problem_type == "multi_label_classification"
        self._max_tokens = min(
            self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 10**9
        )
        self._output, self._batch_size, self._truncates = output, batch_size, on_long == "truncate"
        self.model = _load_model(path, found, config)

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        device = self._device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)  # not in the constructor, because the current CUDA device is chosen after it
        scores: list[float | None] = []
        for start in range(0, len(completions), self._batch_size):
            logits = self._logits(completions[start : start + self._batch_size], start, device)
            scores.extend(self._scores(logits).tolist())
        return scores

    @torch.inference_mode()
    def _logits(self, texts: list[str], start: int, device: torch.device) -> torch.Tensor:
        """Return the classifier's logits `[len(texts), L]` float32; `start` is the row number of the first text."""
        batch = self.tokenizer(
            texts,
            padding=len(texts) > 1,
            truncation=self._truncates,
            max_length=self._max_tokens if self._truncates else None,
            return_tensors="pt",
        )
        lengths = batch["attention_mask"].sum(1)
        if int(lengths.max()) > self._max_tokens:
            row = int(lengths.argmax())
            raise RewardError(
                f"row {start + row} has {int(lengths[row])} tokens for the classifier, which takes at most "
                f"{self._max_tokens}; lower max_new_tokens, or set reward.sentiment_model.on_long=truncate"
            )
        return self.model(**batch.to(device)).logits.float()

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self._output == "logit":
            return logits[:, self._index]
        p = (logits.sigmoid() if self._is_multi_label else logits.softmax(-1))[:, self._index]
        return p if self._output == "probability" else 2 * p - 1


def _load_config_and_tokenizer(path: str, found: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        return (
            AutoConfig.from_pretrained(found, trust_remote_code=False),
            AutoTokenizer.from_pretrained(found, trust_remote_code=False),
        )
    except load_errors() as error:
        raise _unloadable(path, error) from error


def _load_model(path: str, found: str, config: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    errors: tuple[type[Exception], ...] = (*load_errors(), RuntimeError)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            found,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except errors as error:
        raise _unloadable(path, error) from error
    if info["missing_keys"]:  # transformers would initialise them at random
        raise _refused(
            "path",
            path,
            f"is not a trained classifier: its weights lack {', '.join(sorted(info['missing_keys']))}; give one that "
            f"was saved with its classification head",
        )
    return model.eval().requires_grad_(False)


def _index_of(label: str, config: Any) -> int:
    names = {str(name): index for index, name in config.id2label.items()}
    if label not in names:
        raise _refused("label", label, f"must be one of this model's labels, {', '.join(names)}{nearest(label, names)}")
    return int(names[label])


def _unloadable(path: str, error: BaseException) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _refused(
        "path",
        path,
        f"could not be loaded as a classifier ({reason}). Ways on: give a directory that holds config.json, the "
        f"tokenizer and model.safetensors, reward.sentiment_model.path=/dir; or score with VADER's lexicon, which "
        f"needs no model, reward=sentiment; or check the name and that the Hugging Face hub can be reached "
        f"(HF_HUB_OFFLINE=1 says at once that it cannot)",
    )


def _refused(key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"reward.sentiment_model.{key}={value!r} {why}")
