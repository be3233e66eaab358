"""Write a policy in Hugging Face format at another precision: python -m rlft.models.export RUN/model DIRECTORY.

float16 halves the file; `from_pretrained` computes in float32 whatever the file holds.
"""

from __future__ import annotations

import argparse

import torch

from rlft.models.gpt2 import GPT2
from rlft.text.huggingface import huggingface


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="a directory in Hugging Face format with its tokenizer, such as RUN/model")
    parser.add_argument("directory", help="where to write; made if absent")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    args = parser.parse_args()
    tokenizer = huggingface(args.source)
    policy = GPT2.from_pretrained(args.source).to(getattr(torch, args.dtype))
    policy.save_hf(args.directory, eos_id=tokenizer.eos_id)
    tokenizer.save(args.directory)


if __name__ == "__main__":
    main()
