#!/usr/bin/env bash
# Stage 1: bash scripts/run_stage1.sh CONFIG DATA OUT [--key value ...]
# Trains on all GPUs of this machine (NUM_PROCESSES=N for another number); the result is OUT/final_model.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: bash scripts/run_stage1.sh CONFIG DATA OUT [--key value ...]" >&2
  exit 2
fi
config=$1 data=$2 out=$3
shift 3

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
processes=${NUM_PROCESSES:-$gpus}
launch=("${PYTHON:-python}")
if [ "$processes" -gt 1 ]; then
  launch=("${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "$processes")
fi
exec "${launch[@]}" "$here/train.py" "$config" --data_path "$data" --output_dir "$out" "$@"
