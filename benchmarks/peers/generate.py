"""Hugging Face's `generate` on random prompts, timed: the peer of `benchmarks.ours generate`. One JSON line."""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers

PRESETS = {"tiny": (2, 2, 32, 96), "char10m": (6, 6, 384, 96), "gpt2": (12, 12, 768, 50257)}
parser = argparse.ArgumentParser()
parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
for name, default in {"prompts": 2, "group": 8, "plen": 16, "clen": 16, "steps": 5, "warmup": 2, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
layers, heads, width, vocab_size = PRESETS[args.preset]
torch.manual_seed(args.seed)
config = transformers.GPT2Config(
    vocab_size=vocab_size, n_positions=1024, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
    embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1,
    pad_token_id=vocab_size - 1,
)  # fmt: skip
model = transformers.GPT2LMHeadModel(config).eval()
ids = torch.randint(0, 95, (args.prompts, args.plen)).repeat_interleave(args.group, dim=0)
seconds = []
for _ in range(args.warmup + args.steps):
    began = time.perf_counter()
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        min_new_tokens=args.clen, max_new_tokens=args.clen,
    )  # fmt: skip
    assert made.shape[1] == args.plen + args.clen
    seconds.append(time.perf_counter() - began)
kept = seconds[args.warmup :]
print(json.dumps(vars(args) | {"step_s": statistics.median(kept), "steps": kept, "tf": transformers.__version__}))
