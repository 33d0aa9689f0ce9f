#!/usr/bin/env bash
# Starts the training, from any directory, on one node or several:
#
#   scripts/launch_training.sh [--dry-run] [--resume PATH|latest] [--config FILE]
#                              [key=value | --key value | --key=value ...]
#
# Keys are those of training_config.json, by default the one of this folder. The launch itself:
#   --num_processes N        GPUs in all (default: those of this node x nodes)
#   --num_machines N, --machine_rank I, --main_process_ip HOST, --main_process_port PORT
# Under `srun --ntasks-per-node=1` (see train.sbatch) these four come from SLURM.
# --dry-run says what the run needs and takes, and starts nothing.
set -euo pipefail

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
config=$folder/training_config.json
dry_run=false resume="" output_dir=""
num_processes=${NUM_PROCESSES:-} num_machines="" machine_rank="" main_process_ip=""
main_process_port=""
options=()

fail() {
  echo "error: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
}

# Arguments: --key value and --key=value and key=value are one thing; a --key alone means true.
while [ $# -gt 0 ]; do
  argument=$1
  shift
  case $argument in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run | --dry_run)
      dry_run=true
      continue
      ;;
    --*=* | [a-z]*=*)
      key=${argument#--}
      key=${key%%=*}
      value=${argument#*=}
      ;;
    --*)
      key=${argument#--}
      if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
        value=$1
        shift
      else
        case ${key//-/_} in
          resume | config | num_* | machine_rank | main_process_*) fail "--$key needs a value." ;;
        esac
        value=true
      fi
      ;;
    *) fail "$argument: write key=value, --key value or --key=value, for example seed=1." ;;
  esac
  key=${key//-/_}
  case $key in
    config) config=$value ;;
    resume | resume_from_checkpoint) resume=$value ;;
    dry_run) dry_run=$value ;;
    num_processes) num_processes=$value ;;
    num_machines) num_machines=$value ;;
    machine_rank) machine_rank=$value ;;
    main_process_ip) main_process_ip=$value ;;
    main_process_port) main_process_port=$value ;;
    *)
      if [ "$key" = output_dir ]; then output_dir=$value; fi
      options+=("--$key=$value")
      ;;
  esac
done

[ -f "$config" ] || fail "--config $config: no such file (from $PWD)."

# What is not installed runs from where it lies.
find_package='import importlib.util as u, sys; sys.exit(u.find_spec("longcat_video_fft") is None)'
if ! "$python" -c "$find_package"; then
  PYTHONPATH=$(dirname "$folder")${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH
fi

if [ -n "$resume" ]; then
  if [ "$resume" != latest ] && [ ! -d "$resume" ]; then
    where=${output_dir:-$(dirname "$resume")}
    found=$(cd "$where" 2>/dev/null && compgen -G 'checkpoint-*' | sort -V | tr '\n' ' ') || true
    fail "--resume $resume: no such checkpoint (from $PWD). In $where: ${found:-none}"
  fi
  options+=("--resume_from_checkpoint=$resume")
fi

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    # As CUDA reads it: what follows a -1 is not seen.
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *-1/,$d' | grep -c '[^ ]' || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
  fi
}
gpus=$(count_gpus)

if [ "$dry_run" = true ]; then
  planned=${num_processes:-$((gpus * ${num_machines:-1}))}
  if [ "$planned" -gt 0 ]; then options=("--num_gpus=$planned" "${options[@]}"); fi
  exec "$python" -m longcat_video_fft.train "--config=$config" --dry_run=true "${options[@]}"
fi

# Nodes: flags, else the step of srun that this is.
if [ -n "${SLURM_STEP_NODELIST:-}" ] && [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
  if [ "${SLURM_STEP_NUM_TASKS:-$SLURM_STEP_NUM_NODES}" -ne "$SLURM_STEP_NUM_NODES" ]; then
    fail "$SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes: start one a node with srun \
--ntasks-per-node=1; it starts a process a GPU."
  fi
  num_machines=${num_machines:-$SLURM_STEP_NUM_NODES}
  machine_rank=${machine_rank:-$SLURM_NODEID}
  if [ -z "$main_process_ip" ]; then
    main_process_ip=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | sed -n 1p)}
  fi
  main_process_port=${main_process_port:-${MASTER_PORT:-29500}}
fi
num_machines=${num_machines:-1}
if [ "$num_machines" -gt 1 ]; then
  needs="--num_machines $num_machines needs"
  [ -n "$machine_rank" ] || fail "$needs --machine_rank, 0 to $((num_machines - 1))."
  [ -n "$main_process_ip" ] || fail "$needs --main_process_ip, the address of machine 0."
fi
num_processes=${num_processes:-$(((gpus > 0 ? gpus : 1) * num_machines))}
if [ $((num_processes % num_machines)) -ne 0 ]; then
  fail "--num_processes $num_processes is for all machines together and does not divide by their \
number, $num_machines."
fi

launch=(accelerate)
command -v accelerate >/dev/null || launch=("$python" -m accelerate.commands.accelerate_cli)
argv=(--config_file "$folder/scripts/accelerate_fsdp2.yaml" --num_processes "$num_processes")
argv+=(--num_machines "$num_machines" --machine_rank "${machine_rank:-0}")
if [ -n "$main_process_ip" ]; then argv+=(--main_process_ip "$main_process_ip"); fi
if [ -n "$main_process_port" ]; then argv+=(--main_process_port "$main_process_port"); fi
argv+=(-m longcat_video_fft.train "--config=$config" "${options[@]}")

# On SIGTERM the training saves a checkpoint and ends. Only its processes get it: the launcher
# would kill them after 30 seconds. The trap comes before the start: without it a signal ends this
# script alone.
trap 'pkill -TERM -P "$!" || true' TERM
"${launch[@]}" launch "${argv[@]}" &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do
  wait "$launcher" || true  # a signal ends it early
done
status=0
wait "$launcher" || status=$?
exit "$status"
