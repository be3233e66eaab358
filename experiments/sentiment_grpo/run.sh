#!/usr/bin/env bash
# Trains the three settings on seeds 0, 1, 2 and renders results.md and curves.png; about fifteen minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/sentiment_grpo}
train() { # DIRECTORY SETTINGS...: a run that is not finished
  [ -f "$1/summary.json" ] || "$python" train.py +experiment=sentiment_grpo tracker=none "seed=$seed" "run_dir=$1" "${@:2}"
}
for seed in 0 1 2; do
  train "$out/kl-s$seed"
  train "$out/unheld-s$seed" name=sentiment_unheld algo.kl.coef=0
  train "$out/length_repetition-s$seed" name=sentiment_length_repetition algo.kl.coef=0 \
    "reward=[sentiment,length,repetition]"
done
"$python" -m rlft report "$out" --out experiments/sentiment_grpo --samples 10 --reward eval/rewards/sentiment/mean \
  --metrics eval/rewards/sentiment/mean eval/kl_completion eval/distinct_2 eval/reference_perplexity \
  eval/completions/mean_length
