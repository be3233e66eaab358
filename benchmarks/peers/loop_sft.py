"""A plain training loop in nanoGPT's manner (full logits, one cross entropy, fused AdamW), timed. One JSON line."""

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
for name, default in {"batch": 16, "seqlen": 256, "steps": 7, "warmup": 2, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
layers, heads, width, vocab_size = PRESETS[args.preset]
torch.manual_seed(args.seed)
model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=1024, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
seconds = []
for _ in range(args.steps):
    ids = torch.randint(0, vocab_size - 1, (args.batch, args.seqlen + 1))
    began = time.perf_counter()
    logits = model(ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - began)
kept = seconds[args.warmup :]
print(json.dumps(vars(args) | {"step_s": statistics.median(kept), "steps": kept, "tf": transformers.__version__}))
