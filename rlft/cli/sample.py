"""rlft sample: a policy's completions of a prompt, shown while they are drawn.

POLICY is a run directory, one of its checkpoints, a model in Hugging Face format, or a name on its hub. Prompts are
given by --prompt, or line by line in a file or on stdin; an empty one starts from the end-of-text token. The same seed,
prompt and position in the list give the same completion.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlft.cli.parser import Parser
from rlft.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rlft.text.tokenizer import Tokenizer


def parser() -> Parser:
    examples = (
        'rlft sample package:rlft/assets/tiny --prompt "The film" -n 3',
        'rlft sample outputs/grpo/2026-01-01_12-00-00-s0 --prompt "The film" --greedy',
        "head -5 prompts.txt | rlft sample outputs/grpo/2026-01-01_12-00-00-s0 --json > completions.jsonl",
    )
    sample = Parser("sample", __doc__, examples=examples)
    sample.add_argument("policy", metavar="POLICY")
    sample.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    sample.add_argument("--file", metavar="FILE", help="a prompt in each line; - for stdin")
    sample.add_argument("-n", type=int, default=1, metavar="N", help="completions of each prompt")
    sample.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0: all")
    sample.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest mass P; 1: all")
    sample.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--chat", action="store_true", help="a prompt is a user's message, put into the chat template")
    sample.add_argument("--json", action="store_true", help="JSON lines: prompt, completion, finish_reason, tokens")
    sample.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    sample.add_trusted_modules()
    return sample


def run(arguments: list[str]) -> int:
    args = parser().parse(arguments)
    if args.n < 1 or not 0 <= args.seed < 2**64:
        raise ConfigError(f"-n must be at least 1 and --seed in 0 .. 2^64 - 1, got {args.n} and {args.seed}")
    prompts = list(args.prompt) + list(_lines(args.file, has_prompts=bool(args.prompt)))
    if not prompts:
        raise ConfigError('no prompt is given: --prompt "…", --file FILE, or lines on stdin')
    from rlft.cli.policies import named_policy
    from rlft.rollout.sampling import Sampling
    from rlft.rollout.stream import stream
    from rlft.trainer.hardware import Hardware

    sampling = Sampling(
        args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, greedy=args.greedy
    )
    device = Hardware(device=args.device, mixed_precision="no", num_threads=None, tf32=False).torch_device
    policy, tokenizer = named_policy(args.policy, trusted=tuple(args.trusted_modules)).load()
    policy.to(device)
    if policy.mask_id is not None:
        raise ConfigError(f"{args.policy} is a bidirectional policy (algo=denoise), which does not continue a prompt")
    rows = [(text, _ids(text, tokenizer, chat=args.chat, room=policy.context_length)) for text in prompts]
    draw = functools.partial(stream, policy, sampling=sampling, eos_id=tokenizer.eos_id, seed=args.seed)
    for number, (text, ids) in enumerate(rows):
        for member in range(args.n):
            drawn = draw(ids, prompt_number=number, member=member)
            if args.json:
                _print_json(text, list(drawn), tokenizer)
            else:
                _print(text, drawn, tokenizer)
    return 0


def _lines(file: str | None, *, has_prompts: bool) -> Iterator[str]:
    """Yield the lines of a file, or of stdin: for `-`, or if no prompt is given and it is not a terminal."""
    if file is None and (has_prompts or sys.stdin.isatty()):
        return
    try:
        data = sys.stdin.buffer.read() if file in (None, "-") else Path(str(file)).expanduser().read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
        yield from (line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1]))
    except OSError as error:
        raise ConfigError(f"--file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--file {file or '-'}: not UTF-8 at byte {error.start}: save the prompts as UTF-8") from error


def _ids(text: str, tokenizer: Tokenizer, *, chat: bool, room: int) -> list[int]:
    """Return the ids of a prompt: of its text, or of a user's message in the tokenizer's chat template."""
    if chat:
        if tokenizer.hf.chat_template is None:
            raise ConfigError("--chat: this policy's tokenizer has no chat template; leave the flag out")
        from rlft.data.prompts import rendered
        from rlft.data.source import Row

        _, ids = rendered(Row(text, {}, "the prompt", ({"role": "user", "content": text},)), tokenizer=tokenizer)
    else:
        ids = tokenizer.encode(text)
    if not ids and tokenizer.eos_id is None:
        raise DataError("an empty prompt starts from the end-of-text token, and this tokenizer has none")
    ids = ids or [int(tokenizer.eos_id or 0)]
    if len(ids) >= room:
        raise DataError(f"a prompt of {len(ids)} tokens leaves no room in a context of {room}: {text[:40]!r}…")
    return ids


def _print(prompt: str, drawn: Iterable[int], tokenizer: Tokenizer) -> None:
    from rlft.core.printable import printable

    print(printable(prompt), end="", flush=True)
    for piece in tokenizer.decode_stream(drawn):
        print(printable(piece), end="", flush=True)
    print("\n")


def _print_json(prompt: str, ids: list[int], tokenizer: Tokenizer) -> None:
    reason = "stop" if ids[-1] == tokenizer.eos_id else "length"
    row = {"prompt": prompt, "completion": tokenizer.decode(ids), "finish_reason": reason, "tokens": len(ids)}
    print(json.dumps(row, ensure_ascii=False), flush=True)
