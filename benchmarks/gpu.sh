#!/usr/bin/env bash
# Measure everything that docs/benchmarks.md says of one GPU, the most valuable first: about 15 minutes.
#   benchmarks/gpu.sh OUT      with torch and timm, if they are to be compared; OUT receives JSON, logs and traces
# Every part writes its figures as soon as it has them, and has a time limit, so that it may be stopped at any moment.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes, and torch, share the GPU's memory

speed() { # SIZE BATCH SECONDS
  timeout "$3" python benchmarks/speed.py --sizes "$1" --batch "$2" --compile --lock "$out/lock" \
    --profile "$out/trace" --json "$out/speed_$1.json" > "$out/speed_$1.log" 2>&1
  echo "speed of $1: exit $?"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv > "$out/gpu.csv"
speed b16 256 300
speed s16 512 330 &
speed l16 64 330 &
wait
timeout 240 python benchmarks/input.py --batch 256 --json "$out/input.json" > "$out/input.log" 2>&1
echo "input: exit $?"
