#!/usr/bin/env bash
# Every online algorithm, as its YAML stands, on two tasks with equal sampled tokens and seeds 0, 1, 2, and DPO on ranked
# pairs; then the tables and pictures. About two hours of one core; a finished run is not run again.
# OUT (a directory), SEEDS and JOBS (processes at once, a thread each) may be set; parts may be named (run.sh sums report).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-outputs/algorithms} seeds=${SEEDS:-0 1 2}
export OMP_NUM_THREADS=1
algorithms="grpo ppo rloo reinforce_pp_baseline dr_grpo remax dapo reinforce_pp reinforce gspo cispo sapo bnpo raft rwr
  online_dpo"
quiet="save_every=0 log_every=50 tracker=none hardware.num_threads=1"

train() { # DIRECTORY SETTINGS...: prints the command of a run that is not finished
  [ -f "$1/summary.json" ] && return
  [ -f "$1/config.yaml" ] && echo "$python train.py run_dir=$1 resume=true" && return
  echo "$python train.py run_dir=$1 $quiet ${*:2}"
}
at_once() { xargs -P "${JOBS:-2}" -I{} sh -c "{} > /dev/null || { echo failed: {} >&2; exit 1; }"; }

sentiment() {
  for seed in $seeds; do
    for algo in $algorithms; do
      own=""
      [ $algo = ppo ] && own="eval_every=80" # four optimizer steps on each rollout
      [ $algo = bnpo ] && own="reward=[sentiment,custom] reward.sentiment.weight=0
        reward.custom.function=experiments/algorithms/positive.py:positive"
      train "$out/sentiment/$algo-s$seed" name=$algo algo=$algo reward=sentiment model=tiny seed=$seed steps=100000 \
        max_tokens=150000 eval_every=20 $own
    done
  done
}
dpo() { # SEED: 780 pairs, the best and the worst of eight samples, are 150,000 sampled tokens as well
  pairs=$out/dpo/pairs-s$1.jsonl run=$out/dpo/s$1
  mkdir -p "$out/dpo"
  [ -f "$pairs" ] || $python -m rlft rank algo.path="$pairs" algo.num_pairs=780 reward=sentiment seed=$1
  $(train "$run" algo=dpo data=preferences data.source.path="$pairs" seed=$1 steps=180)
  $(train "$out/sentiment/dpo-s$1" name=dpo seed=$1 steps=0 model.path="$run/model" reference=checkpoint \
    reference.path=package:rlft/assets/tiny)
}
sums() {
  for seed in $seeds; do
    for algo in $algorithms; do
      own=""
      [ $algo = ppo ] && own="eval_every=80"
      train "$out/sums/$algo-s$seed" +experiment=sums name=$algo algo=$algo model.path="$out/sums_sft/model" \
        seed=$seed steps=100000 max_tokens=130000 $own
    done
  done
}

report() { # TASK REWARD KL…
  "$python" -m rlft report "$out/$1" --out "experiments/algorithms/$1" --reward "eval/rewards/$2/mean" --metrics \
    eval/kl_completion eval/distinct_2 eval/reference_perplexity --at-kl "${@:3}"
}

for part in ${@:-sentiment dpo sums report}; do
  case $part in
    sentiment) sentiment | at_once ;;
    dpo) for seed in $seeds; do dpo "$seed"; done ;;
    sums)
      $(train "$out/sums_sft" +experiment=sums_sft)
      sums | at_once
      ;;
    report)
      report sentiment sentiment 2 5
      report sums answer 0.2
      ;;
  esac
done
