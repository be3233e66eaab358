#!/usr/bin/env bash
# Trains by rewards and by supervision with equal tokens, and renders results.md and training.png; twelve minutes of one
# core for a seed. TEXT is tiny Shakespeare's file where it cannot be downloaded; OUT, SEEDS and JOBS may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-outputs/char_grpo}
export OMP_NUM_THREADS=1
quiet="tracker=none hardware.num_threads=1"
jobs() {
  for seed in ${SEEDS:-0 1}; do
    echo "$python train.py +experiment=char_grpo $quiet seed=$seed data.text.source.path=${TEXT:-null} \
      run_dir=$out/grpo-s$seed"
    # 256 blocks of 8 tokens are as many as 256 contexts x 8 samples of one token
    echo "$python train.py name=char_sft model=char_scratch reference=none algo=sft reward=[] data=shakespeare_text \
      data.source.path=${TEXT:-null} data.block_size=8 algo.rows_per_step=256 algo.eval_blocks=4096 micro_batch=null \
      steps=3000 learning_rate=2e-3 warmup_steps=20 schedule=cosine eval_every=300 save_every=0 log_every=100 $quiet \
      seed=$seed run_dir=$out/sft-s$seed"
  done
}
jobs | xargs -P "${JOBS:-2}" -I{} sh -c "{} > /dev/null || echo failed: {} >&2"
"$python" -m rlft.report "$out" --out experiments/char_grpo \
  --metrics eval/loss eval/reference_loss eval/reward eval/kl --train eval/loss reward kl entropy
