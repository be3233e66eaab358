#!/usr/bin/env bash
# Trains the three settings on seeds 0, 1, 2 and renders results.md and curves.png; about fifteen minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-outputs/sentiment_grpo}
for seed in 0 1 2; do
  common=(+experiment=sentiment_grpo tracker=none "seed=$seed")
  "$python" train.py "${common[@]}" "run_dir=$out/kl-s$seed"
  "$python" train.py "${common[@]}" name=sentiment_unheld algo.kl.coef=0 "run_dir=$out/unheld-s$seed"
  "$python" train.py "${common[@]}" name=sentiment_length_repetition algo.kl.coef=0 \
    "reward=[sentiment,length,repetition]" "run_dir=$out/length_repetition-s$seed"
done
"$python" -m rlft.report "$out" --out experiments/sentiment_grpo --samples 10 --reward eval/rewards/sentiment/mean \
  --metrics eval/rewards/sentiment/mean eval/kl_completion eval/distinct_2 eval/reference_perplexity \
  eval/completions/mean_length
