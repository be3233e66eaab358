#!/usr/bin/env bash
# Trains seeds 0 to 9 and renders results.md and training.png; about ten minutes. OUT and SEEDS may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-outputs/reinforce_small}
for seed in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do
  [ -f "$out/s$seed/summary.json" ] || "$python" train.py +experiment=reinforce_small seed=$seed tracker=none \
    hardware.num_threads=1 run_dir="$out/s$seed"
done
"$python" -m rlft report "$out" --out experiments/reinforce_small --train reward entropy loss
