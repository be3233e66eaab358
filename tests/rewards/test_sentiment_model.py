"""The classifier reward against direct calls of transformers, on tiny random models with a WordPiece tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    DistilBertTokenizer,
)

from rlft.core.errors import ConfigError, RewardError
from rlft.rewards.compose import RewardSum
from rlft.rewards.sentiment_model import SentimentModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "##ly", "film", "a", "the", ",", "."]
TEXTS = ["Good film.", "bad", "", "a badly, badly bad film. the film, the film", "goodly good"]


def save(directory: Path, *, kind: type = DistilBertForSequenceClassification, **settings: Any) -> Path:
    config = DistilBertConfig(
        vocab_size=len(WORDS), dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=24, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():  # larger than at initialisation, so that the scores differ widely
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.3)
    model.save_pretrained(directory)
    DistilBertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("sst2"), id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={})


def make(directory: Path, **arguments: Any) -> SentimentModel:
    return SentimentModel(str(directory), **{"device": "cpu", **arguments})


def score(reward: SentimentModel, texts: list[str]) -> torch.Tensor:
    values = reward(prompts=["p"] * len(texts), completions=texts, completion_ids=[[0]] * len(texts), label=[0])
    assert all(isinstance(value, float) for value in values)
    return torch.tensor(values)


def direct_logits(directory: Path, texts: list[str]) -> torch.Tensor:
    """One unpadded forward pass for each text."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def test_each_output_equals_a_direct_call_of_transformers(directory: Path) -> None:
    logits = direct_logits(directory, TEXTS)
    assert logits[:, 1].std() > 0.1  # the texts have different scores, so the comparison is meaningful
    p = logits.softmax(-1)[:, 1]
    close: dict[str, Any] = {
        "rtol": 0,
        "atol": 2e-6,
    }  # float32: padded and unpadded sums are in a different order
    torch.testing.assert_close(score(make(directory), TEXTS), p, **close)
    torch.testing.assert_close(score(make(directory, output="signed"), TEXTS), 2 * p - 1, **close)
    torch.testing.assert_close(score(make(directory, output="logit"), TEXTS), logits[:, 1], rtol=2e-6, atol=2e-6)


def test_a_label_is_chosen_by_its_name(directory: Path) -> None:
    positive, negative = score(make(directory), TEXTS), score(make(directory, label="NEGATIVE"), TEXTS)
    torch.testing.assert_close(positive + negative, torch.ones(len(TEXTS)), rtol=0, atol=1e-6)
    assert (positive - negative).abs().max() > 0.01


def test_the_score_depends_on_neither_batch_size_nor_neighbours_nor_padding(directory: Path) -> None:
    alone = torch.cat([score(make(directory, output="logit"), [text]) for text in TEXTS])
    for batch_size in (1, 2, 64):
        together = score(make(directory, output="logit", batch_size=batch_size), TEXTS)
        torch.testing.assert_close(together, alone, rtol=2e-6, atol=2e-6)  # float32, as above
    backwards = score(make(directory, output="logit"), TEXTS[::-1])
    torch.testing.assert_close(backwards.flip(0), alone, rtol=2e-6, atol=2e-6)


def test_a_multi_label_model_has_a_sigmoid_for_each_label(tmp_path: Path) -> None:
    save(tmp_path, problem_type="multi_label_classification", id2label={0: "joy", 1: "anger", 2: "fear"}, label2id={})
    expected = direct_logits(tmp_path, TEXTS).sigmoid()[:, 2]
    torch.testing.assert_close(score(make(tmp_path, label="fear"), TEXTS), expected, rtol=0, atol=2e-6)


def test_a_model_with_one_output_has_a_logit_only(tmp_path: Path) -> None:
    save(tmp_path, num_labels=1)
    expected = direct_logits(tmp_path, TEXTS)[:, 0]
    reward = make(tmp_path, label="LABEL_0", output="logit")
    torch.testing.assert_close(score(reward, TEXTS), expected, rtol=2e-6, atol=2e-6)
    with pytest.raises(ConfigError, match=r"output='probability' must be logit"):
        make(tmp_path, label="LABEL_0")


def test_a_long_completion_is_an_error_that_names_its_row_or_is_cut_where_asked(directory: Path) -> None:
    fits, long = " ".join(["good"] * 22), " ".join(["good"] * 22 + ["bad"] * 9)  # 24 tokens with [CLS] and [SEP]
    total = RewardSum({"judge": make(directory, batch_size=2)}, weights={"judge": 1.0}, timeouts={"judge": 60.0})
    with pytest.raises(RewardError, match=r"'judge': row 2 has 33 tokens .* at most 24; .*on_long=truncate"):
        total(prompts=["p"] * 3, completions=["a", fits, long], completion_ids=[[1]] * 3, columns={})
    cut = score(make(directory, on_long="truncate"), [fits, long])
    torch.testing.assert_close(cut[1], cut[0], rtol=0, atol=1e-6)


def test_scoring_draws_no_random_number_and_keeps_no_gradient(directory: Path) -> None:
    reward = make(directory)  # DistilBERT has dropout: in training mode two calls would differ
    before = torch.random.get_rng_state()
    assert torch.equal(score(reward, TEXTS), score(reward, TEXTS))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    save(tmp_path, kind=DistilBertModel, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={})
    with pytest.raises(ConfigError, match=r"not a trained classifier.*classifier\.weight"):
        make(tmp_path)


def test_a_pickled_model_is_not_loaded(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pickled"
    shutil.copytree(directory, copy)
    (copy / "model.safetensors").unlink()
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"could not be loaded"):
        make(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "POSITVE"}, r"label='POSITVE'.*NEGATIVE, POSITIVE.*did you mean 'POSITIVE'"),
        ({"output": "prob"}, r"output='prob'.*probability, logit, signed"),
        ({"on_long": "skip"}, r"on_long='skip'.*error, truncate"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"batch_size": True}, r"batch_size=True"),
        ({"device": "gpu"}, r"device='gpu'.*auto, cpu, cuda"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_weights_are_read(
    directory: Path, tmp_path: Path, arguments: dict, message: str
) -> None:
    copy = tmp_path / "without_weights"
    shutil.copytree(directory, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=message):
        make(copy, **arguments)


def test_without_a_hub_the_error_names_the_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        SentimentModel("nobody/has-this-model-on-their-machine")
    assert "reward.sentiment_model.path=/dir" in str(caught.value)
    assert "reward=sentiment" in str(caught.value)
    assert "nobody/has-this-model-on-their-machine" in str(caught.value)


def test_a_directory_that_does_not_exist_is_refused_without_asking_the_hub() -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        SentimentModel("/no/such/directory")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_score_on_a_gpu_is_the_score_on_the_cpu(directory: Path) -> None:
    on_gpu = make(directory, device="auto", output="logit")
    torch.testing.assert_close(score(on_gpu, TEXTS), direct_logits(directory, TEXTS)[:, 1], rtol=1e-4, atol=1e-4)
    assert next(on_gpu.model.parameters()).is_cuda
