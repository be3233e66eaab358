#!/usr/bin/env bash
# Every online algorithm, as its YAML stands, on sentiment with equal sampled tokens, seeds 0, 1, 2: an hour of one core.
# A finished run is not run again. OUT, SEEDS and JOBS (processes, one thread each) may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-outputs/algorithms/sentiment}
export OMP_NUM_THREADS=1
jobs() {
  for seed in ${SEEDS:-0 1 2}; do
    for algo in grpo ppo rloo reinforce_pp_baseline dr_grpo remax dapo reinforce_pp reinforce gspo cispo sapo bnpo raft rwr online_dpo; do
      dir=$out/$algo-s$seed
      [ -f "$dir/summary.json" ] && continue
      own=""
      [ $algo = ppo ] && own="eval_every=80" # four optimizer steps on each rollout
      [ $algo = bnpo ] && own="reward=[sentiment,custom] reward.sentiment.weight=0 reward.custom.function=experiments/algorithms/positive.py:positive"
      echo "$python train.py name=$algo algo=$algo reward=sentiment model=tiny seed=$seed run_dir=$dir steps=100000 max_tokens=150000 eval_every=20 save_every=0 log_every=20 tracker=none hardware.num_threads=1 $own"
    done
  done
}
jobs | xargs -P "${JOBS:-2}" -I{} sh -c "{} || echo failed: {} >&2"
