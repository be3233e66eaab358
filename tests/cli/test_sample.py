"""rlft sample: the draws are those of a rollout, text comes in whole characters, prompts come from anywhere."""

from __future__ import annotations

import io
import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rlft import cli
from rlft.models.gpt2 import GPT2
from rlft.models.hf import HFCausalLM
from rlft.rollout.engine import generate
from rlft.rollout.sampling import Sampling
from rlft.rollout.stream import stream
from rlft.text.huggingface import huggingface
from tests.builders import TOKENIZER, tiny

TINY = "package:rlft/assets/tiny"


def llama() -> HFCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return HFCausalLM(LlamaForCausalLM(LlamaConfig(vocab_size=12, max_position_embeddings=32, **sizes)))


@pytest.mark.parametrize("made", [lambda: tiny(3, spread=0.5, n_layer=2), llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(9), Sampling(9, greedy=True), Sampling(9, temperature=0.7, top_k=4), Sampling(40, top_p=0.8)],
    ids=["plain", "greedy", "top-k", "top-p to the context's end"],
)
def test_a_stream_draws_what_generate_draws(made, sampling):
    policy, prompts = made(), [[1, 2, 3], [4]]
    whole = generate(policy, prompts, group_size=3, sampling=sampling, eos_id=11, seed=5).completions()
    streamed = [
        list(stream(policy, prompts[p], sampling=sampling, eos_id=11, seed=5, prompt_number=p, member=m))
        for p in range(2)
        for m in range(3)
    ]
    assert streamed == whole


def rows(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def test_prompts_come_from_the_line_a_file_and_stdin_and_each_has_its_draws(tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfOne\r\nTwo\n")
    common = ["sample", TINY, "--json", "--max-new-tokens", "4", "-n", "2", "--seed", "3"]
    assert cli.main([*common, "--prompt", "One", "--prompt", "Two"]) == 0
    given = rows(capsys)
    assert [row["prompt"] for row in given] == ["One", "One", "Two", "Two"]
    assert all(1 <= row["tokens"] <= 4 and row["finish_reason"] in ("stop", "length") for row in given)
    assert given[0]["completion"] != given[1]["completion"]  # by the seed above
    assert cli.main([*common, "--file", str(tmp_path / "prompts.txt")]) == 0
    assert rows(capsys) == given
    stdin = io.TextIOWrapper(io.BytesIO(b"One\nTwo\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main(common) == 0
    assert rows(capsys) == given


def test_what_is_not_json_shows_the_prompt_and_its_completion(capsys):
    assert cli.main(["sample", TINY, "--prompt", "One", "--greedy", "--max-new-tokens", "3", "--json"]) == 0
    (row,) = rows(capsys)
    assert cli.main(["sample", TINY, "--prompt", "One", "--greedy", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == "One" + row["completion"] + "\n\n"


def test_an_empty_prompt_starts_from_the_end_token_and_a_long_one_is_refused(capsys):
    assert cli.main(["sample", TINY, "--prompt", "", "--max-new-tokens", "3", "--json"]) == 0
    assert rows(capsys)[0]["prompt"] == ""
    assert cli.main(["sample", TINY, "--prompt", "film " * 200]) == 3
    assert "leaves no room in a context of 128" in capsys.readouterr().err


def test_stream_refuses_prompts_without_room():
    with pytest.raises(ValueError, match="1 to 31 tokens"):
        next(stream(tiny(), [1] * 32, sampling=Sampling(3), eos_id=TOKENIZER.eos_id, seed=0))


def test_chat_puts_the_prompt_into_the_template_of_the_model(tmp_path, capsys):
    tokenizer = huggingface(TINY)
    tokenizer.hf.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    GPT2.from_pretrained(TINY).save_hf(tmp_path, eos_id=tokenizer.eos_id)
    tokenizer.save(tmp_path)
    common = ["sample", str(tmp_path), "--json", "--max-new-tokens", "6", "--prompt"]
    assert cli.main([*common, "<user>A film<assistant>"]) == 0
    (written,) = rows(capsys)
    assert cli.main([*common, "A film", "--chat"]) == 0
    assert rows(capsys) == [written | {"prompt": "A film"}]


def test_a_prompt_is_a_line_whatever_else_separates_lines_for_unicode(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes("a\x0cb\u2028c\n\nd".encode())
    assert cli.main(["sample", TINY, "--json", "--max-new-tokens", "1", "--file", str(tmp_path / "prompts.txt")]) == 0
    assert [row["prompt"] for row in rows(capsys)] == ["a\x0cb\u2028c", "", "d"]


def test_a_character_outside_an_exported_alphabet_is_named(tmp_path, capsys):
    TOKENIZER.save(tmp_path)
    tiny().save_hf(tmp_path, eos_id=TOKENIZER.eos_id)
    assert cli.main(["sample", str(tmp_path), "--prompt", "abc", "--max-new-tokens", "2", "--json"]) == 0
    assert cli.main(["sample", str(tmp_path), "--prompt", "xyz"]) == 3
    assert "cannot encode 'xyz'" in capsys.readouterr().err
