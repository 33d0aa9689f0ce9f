#!/usr/bin/env bash
# One node of 8 GPUs or several; submit it in this folder, where its paths begin and logs/ is:
#
#   sbatch [--nodes=N] run_deepspeed.sh [any option of train_ds.py]
#
# One launcher a node, which starts a process a GPU. Ten minutes before its time is up the training
# gets the signal to save a checkpoint and end; the job is then queued again and resumes from there.
# So does a job that SLURM itself queues again, and one submitted again with the same output_dir.
# Where a step takes longer than that, give it more: sbatch --signal=B:USR1@3600 run_deepspeed.sh.
# NUM_GPUS, MASTER_PORT: in place of all GPUs of a node, and of 29500.
#SBATCH --job-name=longcat-omni
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is for SLURM: sbatch run_deepspeed.sh. On one machine \
without it: deepspeed --num_gpus=8 train_ds.py"
# SLURM runs a copy of this file, which does not know where the folder is.
[ -f train_ds.py ] || fail "no train_ds.py in $PWD. Submit in vss_longcat_omni/, or with sbatch \
--chdir=FOLDER."
# The environment that was active when the job was submitted, else that of this project.
if ! command -v deepspeed >/dev/null; then PATH=$PWD/.venv/bin:$PWD/../.venv/bin:$PATH; fi
command -v deepspeed >/dev/null || fail "no deepspeed on PATH. Activate the environment, then \
submit."

# A checkpoint named by the user is where the first start begins; a later one resumes from the last.
# trainer_state.json is written last: a checkpoint without it was cut off.
can_resume='
import argparse, json, os, pathlib
parser = argparse.ArgumentParser(add_help=False)
for name in ("config", "output_dir", "resume_from_checkpoint"):
    parser.add_argument(f"--{name}")
given = vars(parser.parse_known_args()[0])
values = json.loads(pathlib.Path(given["config"]).read_text("utf-8")) if given["config"] else {}
values |= {name: value for name, value in given.items() if value}
output_dir = pathlib.Path(values.get("output_dir") or "longcat-flash-omni-vss-lora")
has_checkpoint = any(output_dir.glob("checkpoint-*/trainer_state.json"))
is_restart = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
print(has_checkpoint and (is_restart or not values.get("resume_from_checkpoint")))
'
resume=$(python3 -c "$can_resume" "$@")
if [ "$resume" = True ]; then set -- "$@" --resume_from_checkpoint latest; fi

# deepspeed takes more than one node from a hostfile alone.
mkdir -p logs
hostfile=logs/hosts-$SLURM_JOB_ID
num_gpus=${NUM_GPUS:-${SLURM_GPUS_ON_NODE:-8}}
host_names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
mapfile -t hosts <<<"$host_names"
for host in "${hosts[@]}"; do echo "$host slots=$num_gpus"; done >"$hostfile"

argv=(--no_ssh --hostfile="$hostfile" --num_nodes="${#hosts[@]}" --num_gpus="$num_gpus")
argv+=(--master_addr="${hosts[0]}" --master_port="${MASTER_PORT:-29500}" train_ds.py "$@")
is_stopped=false
# shellcheck disable=SC2329  # the trap calls it
stop() {
  # The training's processes alone: the launchers would kill them 30 seconds after their own signal.
  is_stopped=true
  srun --overlap --ntasks-per-node=1 \
    pkill -USR1 -u "$(id -u)" -f '^[^ ]+ -u train_ds\.py' || true
}
trap stop USR1  # before the start: without it a signal ends this script alone
# shellcheck disable=SC2016  # each node has its own SLURM_NODEID
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none \
  bash -c 'exec deepspeed --node_rank="$SLURM_NODEID" "$@"' bash "${argv[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do
  wait "$step" || true  # a signal ends it early
done
status=0
wait "$step" || status=$?
if [ "$is_stopped" = true ] && [ "$status" -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
