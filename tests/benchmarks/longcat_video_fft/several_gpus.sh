#!/usr/bin/env bash
# LongCat-Video at the released config on the GPUs of one machine, made for eight H200:
#
#   bash tests/benchmarks/longcat_video_fft/several_gpus.sh OUT [bf16 fp8 hsdp context checkpoint]
#
# from the repository's root. 93 frames of 480x832, micro-batch 1, random weights, the same global
# batch of samples in all parts but the first two. Each run is stopped after 10 minutes
# (SECONDS_A_RUN). OUT/NAME.json has its numbers, OUT/NAME.log its steps.
#
#   bf16, fp8     the shipped config's plan: FSDP2 over all GPUs, 4 micro-batches a step; profiled
#   hsdp          2 copies, each cut over half of the GPUs
#   context       one sample on 1, 2 and all GPUs: the same global batch, so the same loss
#   checkpoint    written on all GPUs, resumed on half of them
#
# To try it on fewer: NUM_GPUS=2 DEPTH=4 bash ... . PYTHON names the interpreter.
set -euo pipefail

out=${1:?usage: bash several_gpus.sh OUT [part ...]}
shift
[ $# -gt 0 ] || set -- bf16 fp8 hsdp context checkpoint
gpus=${NUM_GPUS:-8} depth=${DEPTH:-48} limit=${SECONDS_A_RUN:-600}
python=${PYTHON:-python3}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$out"

measure() { # measure NAME GPUS [option ...]
  local name=$1 processes=$2 status=0
  shift 2
  echo "== $name: $processes GPUs, $*"
  timeout --kill-after=20 "$limit" "$python" -u -m torch.distributed.run --standalone \
    --nproc_per_node "$processes" -m tests.benchmarks.longcat_video_fft.measure_training \
    --depth "$depth" "$@" >"$out/$name.log" 2>&1 || status=$?
  grep '^step ' "$out/$name.log" || true
  grep '^{' "$out/$name.log" | tail -n 1 | tee "$out/$name.json" || true
  [ "$status" -eq 0 ] || { echo "$name: exit status $status"; tail -n 20 "$out/$name.log"; }
}

for part in "$@"; do
  case $part in
    bf16) measure bf16 "$gpus" --steps 4 --gradient_accumulation_steps 4 --profile "$out/bf16" ;;
    fp8)
      measure fp8 "$gpus" --steps 4 --gradient_accumulation_steps 4 --fp8_linears true \
        --profile "$out/fp8"
      ;;
    hsdp)
      measure hsdp "$gpus" --steps 5 --fsdp_replicate_size 2 --profile "$out/hsdp"
      ;;
    context)
      for size in $(printf '%s\n' 1 2 "$gpus" | sort -nu); do
        measure "context-$size" "$gpus" --steps 4 --context_parallel_size "$size" \
          --gradient_accumulation_steps "$size"
      done
      ;;
    checkpoint)
      rm -rf "$out/checkpoint"
      measure saved "$gpus" --steps 3 --checkpoint "$out/checkpoint"
      measure resumed $((gpus / 2)) --steps 2 --gradient_accumulation_steps 2 \
        --resume "$out/checkpoint/checkpoint-3"
      rm -rf "$out/checkpoint"
      ;;
    *)
      echo "error: $part: no such part" >&2
      exit 2
      ;;
  esac
done
