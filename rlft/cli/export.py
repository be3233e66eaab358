"""rlft export: write a policy and its tokenizer in Hugging Face format, for AutoModelForCausalLM.

POLICY is a run directory, one of its checkpoints, a model in Hugging Face format, or a name on its hub. float16 and
bfloat16 halve the size of the files; rlft computes in float32 from any of them.
"""

from __future__ import annotations

from pathlib import Path

from rlft.cli.parser import Parser, output_directory
from rlft.core.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    example = "rlft export outputs/grpo/2026-01-01_12-00-00-s0 my-policy --dtype bfloat16"
    export = Parser("export", __doc__, examples=(example,))
    export.add_argument("policy", metavar="POLICY")
    export.add_argument("directory", type=Path, metavar="DIRECTORY", help="where to write: a new or an empty directory")
    export.add_argument("--dtype", choices=DTYPES, default="float32")
    export.add_trusted_modules()
    return export


def run(arguments: list[str]) -> int:
    args = parser().parse(arguments)
    if args.directory.exists() and (not args.directory.is_dir() or any(args.directory.iterdir())):
        raise ConfigError(f"{args.directory} exists and is no empty directory: name another one")
    output_directory(args.directory)
    import torch

    from rlft.cli.policies import named_policy

    policy, tokenizer = named_policy(args.policy, trusted=tuple(args.trusted_modules)).load()
    policy.to(getattr(torch, args.dtype)).save_hf(args.directory, eos_id=tokenizer.eos_id)
    tokenizer.save(args.directory)
    print(f"rlft: {args.directory}: {policy.num_parameters():,} parameters in {args.dtype}")
    return 0
