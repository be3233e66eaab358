"""A checkpoint of a reward model or classifier as reward: its scores are those of the trained model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlft.core.errors import CheckpointError, ConfigError, RewardError
from rlft.rewards.reward_model import RewardModel
from tests.algos.offline.builders import PAIRS, build_offline, labelled, pairs
from tests.builders import TOKENIZER, perturbed, policy_gradient, tiny, trainer

PROMPTS, COMPLETIONS = ["abc", "d", "efghijk", ""], ["dd", "", "a", "kk"]


def finished(run_dir: Path, algorithm, policy) -> str:
    """Writes a run as rlft/run.py does, with a head that is not zero; returns its checkpoint."""
    if algorithm.head is not None:
        perturbed(algorithm.head, seed=3, spread=0.5)
    made = trainer(policy, algorithm, run_dir, steps=1)
    made.train()
    policy.save_hf(run_dir / "model", eos_id=TOKENIZER.eos_id)
    TOKENIZER.save(run_dir / "model")
    return str(run_dir / "checkpoints" / "step_00000001")


@pytest.fixture(scope="module")
def model_of_pairs(tmp_path_factory):
    policy = tiny(9, spread=0.25)
    algorithm = build_offline("reward_model", policy=policy, data=pairs())
    return algorithm, finished(tmp_path_factory.mktemp("pairs"), algorithm, policy)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    policy = tiny(8, spread=0.25)
    algorithm = build_offline("classification", policy=policy, data=labelled())
    return algorithm, finished(tmp_path_factory.mktemp("classes"), algorithm, policy)


def call(reward: RewardModel, prompts=PROMPTS, completions=COMPLETIONS) -> list[float]:
    return reward(prompts=prompts, completions=completions, completion_ids=[[0]] * len(prompts), number=[0])


@torch.no_grad()
def outputs(algorithm, text: str) -> list[float]:
    """The head on the last state of the text and its end token, by a forward pass of this row alone."""
    ids = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    return algorithm.head.linear(algorithm.run.policy(torch.tensor([ids]))[0, -1]).tolist()


@pytest.mark.parametrize("batch_size", [64, 1, 3])
def test_score_of_pairs_is_the_trained_one(model_of_pairs, batch_size):
    algorithm, path = model_of_pairs
    scores = call(RewardModel(path, batch_size=batch_size))
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = [outputs(algorithm, text)[0] for text in texts[:3]]
    assert scores[:3] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    start = [TOKENIZER.eos_id, *TOKENIZER.encode("kk"), TOKENIZER.eos_id]  # an empty prompt is the end token
    with torch.no_grad():
        last = algorithm.head.linear(algorithm.run.policy(torch.tensor([start]))[0, -1]).item()
    assert scores[3] == pytest.approx(last, rel=1e-5)


def test_score_orders_pairs_as_the_loss_saw_them(model_of_pairs):
    algorithm, path = model_of_pairs
    prompts, chosen, rejected = zip(*PAIRS, strict=True)
    reward = RewardModel(path)
    high, low = call(reward, list(prompts), list(chosen)), call(reward, list(prompts), list(rejected))
    accuracy = sum(a > b for a, b in zip(high, low, strict=True)) / len(PAIRS)
    assert accuracy == algorithm.evaluate().metrics["eval/accuracy"]


@pytest.mark.parametrize(("label", "index"), [("x", 0), ("z", 2)])
@pytest.mark.parametrize("output", ["probability", "signed", "logit"])
def test_classifier_gives_the_probability_of_its_class(classifier, label, index, output):
    algorithm, path = classifier
    scores = call(RewardModel(path, label=label, output=output))
    for score, prompt, completion in zip(scores, PROMPTS, COMPLETIONS, strict=True):
        logits = outputs(algorithm, prompt + completion)
        p = math.exp(logits[index]) / sum(map(math.exp, logits))
        expected = {"probability": p, "signed": 2 * p - 1, "logit": math.log(p / (1 - p))}[output]
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_classes_may_be_given_as_numbers(tmp_path):
    policy = tiny(8)
    data = labelled([("abc", 0), ("d", 1)])
    path = finished(tmp_path, build_offline("classification", policy=policy, data=data), policy)
    assert RewardModel(path, label=1).index == 1


def test_nothing_is_trained_through_it(model_of_pairs):
    reward = RewardModel(model_of_pairs[1])
    assert not any(parameter.requires_grad for parameter in reward.trunk.parameters()) and not reward.trunk.training


def test_a_text_longer_than_its_context_is_an_error(model_of_pairs):
    reward = RewardModel(model_of_pairs[1])
    call(reward, ["a" * 20], ["b" * 11])  # 32 with the end token
    with pytest.raises(RewardError, match="row 1 has 33 tokens for the reward model, whose context is 32"):
        call(reward, ["a", "a" * 20], ["b", "b" * 12])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"label": "x"}, "is a model of pairs, which has no classes"),
        ({"output": "probabilty"}, "did you mean 'probability'"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(model_of_pairs, knobs, message):
    with pytest.raises(ConfigError, match=message):
        RewardModel(model_of_pairs[1], **knobs)


@pytest.mark.parametrize("label", [None, "w"])
def test_a_classifier_needs_one_of_its_classes(classifier, label):
    with pytest.raises(ConfigError, match=rf"label={label} must be one of the classifier's classes, x, y, z"):
        RewardModel(classifier[1], label=label)


def test_checkpoint_of_another_algorithm_is_refused(tmp_path):
    policy = tiny(1)
    path = finished(tmp_path, policy_gradient("reinforce", policy=policy), policy)
    with pytest.raises(ConfigError, match=r"reward\.reward_model\.path=.* is of no run with algo=reward_model"):
        RewardModel(path)


def test_run_that_is_not_finished_damaged_or_absent_is_refused(tmp_path):
    policy = tiny(1)
    path = finished(tmp_path, build_offline("reward_model", policy=policy, data=pairs()), policy)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="its run has not finished"):
        RewardModel(path)
    (Path(path) / "head.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"head\.safetensors is missing or damaged"):
        RewardModel(path)
    with pytest.raises(ConfigError, match="there is no such directory"):
        RewardModel(str(tmp_path / "nowhere"))


def test_prompt_that_a_template_wrote_is_refused(model_of_pairs):
    reward = RewardModel(model_of_pairs[1])
    token = reward.tokenizer.hf.all_special_tokens[0]
    reward.tokenizer.hf.chat_template = "{{ messages }}"
    with pytest.raises(RewardError, match="rendered by a chat template"):
        call(reward, [f"a{token}"], ["b"])


def test_state_in_the_checkpoint_says_what_it_reads(model_of_pairs, classifier):
    for (_, path), expected in ((model_of_pairs, {"reads": "pairs"}), (classifier, {"classes": ["x", "y", "z"]})):
        state = json.loads((Path(path) / "state.json").read_text())["algorithm"]
        assert expected.items() <= state.items()
