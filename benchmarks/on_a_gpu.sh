#!/usr/bin/env bash
# All that is to be measured on a GPU, one after another, with the tables in runs/gpu:
#   bash benchmarks/on_a_gpu.sh            # what steps, audits, frontiers cost there, and what half precision changes
#   bash benchmarks/on_a_gpu.sh large      # the target of 30 M parameters: trained, decomposed, pruned
# What is finished is not done again. docs/scale.md says what the figures are for.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-runs/gpu}
mkdir -p "$out"

measure() { # measure NAME SCRIPT [ARGUMENT ...]
  local name=$1 script=$2
  shift 2
  [ -f "$out/$name.done" ] && return
  echo "== $name"
  "$python" "benchmarks/$script" "$@" | tee "$out/$name.txt"
  touch "$out/$name.done"
}

fit() { "$python" -m pdprune.train fit --config "$1" --config configs/trainer/gpu.yaml --ckpt_path last; }

if [ "${1:-}" = large ]; then
  fit configs/targets/large.yaml
  fit configs/decompose/large-py.yaml
  fit configs/large-quote.yaml
  exit
fi
measure step_cost step_cost.py --device cuda --json "$out/step_cost.json"
measure step_cost-compiled step_cost.py --device cuda --compile --json "$out/step_cost-compiled.json"
measure audit_cost step_cost.py --device cuda --tokens 8192 --components larger --audit 0 2 --json "$out/audit_cost.json"
for compute in float32 bfloat16 float16; do
  measure "time-$compute" where_time_goes.py --device cuda --compute "$compute" --json "$out/time-$compute.json"
done
measure frontier frontier.py --device cuda --levels 4 16 --json "$out/frontier.json"
for precision in bf16-mixed 16-mixed; do
  for target in dense-py sparse-py; do
    measure "$precision-$target" precision.py --precision "$precision" --device cuda --seeds 0 1 2 -- \
      --model.decomposition.target "$target"
  done
done
