#!/usr/bin/env bash
# Trains by rewards and by supervision with equal tokens, and renders results.md and training.png; about 25 minutes of
# one core. TEXT is tiny Shakespeare's file where it cannot be downloaded; OUT, SEEDS may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-outputs/char_grpo}
export OMP_NUM_THREADS=1
common="tracker=none hardware.num_threads=1"
for seed in ${SEEDS:-0}; do
  [ -f "$out/grpo-s$seed/summary.json" ] || "$python" train.py +experiment=char_grpo $common seed=$seed \
    data.text.source.path="${TEXT:-null}" run_dir="$out/grpo-s$seed"
  # 117 blocks of 35 tokens are the 4,096 tokens of 256 contexts x 4 samples x 4 tokens, to a thousandth
  [ -f "$out/sft-s$seed/summary.json" ] || "$python" train.py name=char_sft model=char_scratch reference=none \
    algo=sft reward=[] data=shakespeare_text data.block_size=35 algo.rows_per_step=117 micro_batch=null \
    steps=1000 learning_rate=1.5e-3 warmup_steps=20 schedule=cosine eval_every=100 save_every=0 log_every=50 $common \
    seed=$seed data.source.path="${TEXT:-null}" run_dir="$out/sft-s$seed"
done
"$python" -m rlft.report "$out" --out experiments/char_grpo \
  --metrics eval/loss eval/reference_loss eval/reward eval/kl --train eval/loss eval/reward eval/kl entropy
