#!/usr/bin/env bash
# Trains by rewards and by supervision with equal tokens, and renders results.md and training.png; twelve minutes of one
# core for a seed; a finished run is not run again. TEXT is tiny Shakespeare's file where it cannot be downloaded; OUT,
# SEEDS and JOBS may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-outputs/char_grpo}
export OMP_NUM_THREADS=1
train() { # DIRECTORY SETTINGS...: prints the command of a run that is not finished
  [ -f "$1/summary.json" ] && return
  [ -f "$1/config.yaml" ] && echo "$python train.py run_dir=$1 resume=true" && return
  echo "$python train.py run_dir=$1 tracker=none hardware.num_threads=1 ${*:2}"
}
for seed in ${SEEDS:-0 1 2}; do
  train "$out/grpo-s$seed" +experiment=char_grpo seed=$seed data.source.path="${TEXT:-null}"
  train "$out/sft-s$seed" +experiment=char_sft seed=$seed data.source.path="${TEXT:-null}"
done | xargs -P "${JOBS:-2}" -I{} sh -c "{} > /dev/null || { echo failed: {} >&2; exit 1; }"
"$python" -m rlft report "$out" --out experiments/char_grpo \
  --metrics eval/loss eval/reference_loss eval/reward eval/kl --train eval/loss reward kl entropy
