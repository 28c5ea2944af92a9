#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster, a job for each work unit.
#
#   launch/slurm.sh launch --config=configs/celeba64.py \
#     --workdir=/shared/me/faces --nodes=2 --gpus=8 --time=24:00:00
#   launch/slurm.sh launch --config=configs/cifar10.py \
#     --sweep=configs/sweeps/seeds.py --workdir=/shared/me/seeds
#
# submits the jobs that are not there, with a process for each GPU. Two minutes
# before its time is up, or when it is preempted, a job saves and is queued
# again, and goes on from its last checkpoint, until it is done.
#
# Also, with the same flags, or with --name=RESOURCE for a single one:
#   launch/slurm.sh watch ...   states, and what the jobs print
#   launch/slurm.sh stop ...    save and end, and do not queue again
#   launch/slurm.sh delete ...  cancel at once; the workdirs stay
#
# Flags:
#   --config, --sweep, --workdir, --config.FIELD   as in launch/units.py
#   --dry-run          print all commands and run none
#   --name=vitgan      what the names of the jobs begin with
#   --nodes=1          --gpus=1, on each of them; 0 is a process on CPUs
#   --time=24:00:00    after which a job is queued again
#   --partition=NAME   --account=NAME (default: those of the cluster)
#
# Run it on the login node, in a folder that all nodes see, with .venv in it:
# make install, then pip install -c constraints.txt -e '.[cuda]'.

source "$(dirname "$0")/lib.sh"
actions="launch watch stop delete"
flags="nodes gpus time partition account"
nodes=1
gpus=1
time=24:00:00
partition=
account=
parse "$@"

queue() {
  run squeue --noheader --user="${USER:-$(id -un)}" --name="$1" \
    --format="%i %T"
}

launch_unit() {
  local command jobs words=(--job-name="$1" --nodes="$nodes" --time="$time")
  if [[ $gpus -gt 0 ]]; then
    words+=(--ntasks-per-node="$gpus" --gpus-per-node="$gpus")
  else
    words+=(--ntasks-per-node=1)
  fi
  [[ -z $partition ]] || words+=(--partition="$partition")
  [[ -z $account ]] || words+=(--account="$account")
  eval "command=($3)" # the units' commands are quoted for a shell
  if $dry_run; then
    say "If $1 is there, it is left alone:"
    queue "$1"
  else
    jobs=$(queue "$1") || fail "squeue cannot say whether $1 is there"
    if [[ -n $jobs ]]; then
      say "$1: is there already"
      return
    fi
  fi
  run mkdir -p runs/slurm
  run sbatch "${words[@]}" --output="runs/slurm/$1.log" \
    launch/slurm_job.sbatch "${command[@]}" --distributed
}

watch_unit() {
  run squeue --user="${USER:-$(id -un)}" --name="$1"
  if [[ $num_units -eq 1 ]]; then
    run tail -n 50 -F "runs/slurm/$1.log"
  else
    run tail -n 3 "runs/slurm/$1.log" || say "not there yet"
  fi
}

stop_unit() {
  local job jobs state
  if $dry_run; then
    queue "$1"
    say "With the JOB of that, if it is RUNNING:"
    run scontrol update JobId=JOB Requeue=0
    run scancel --signal=TERM JOB
    say "If it waits, it has nothing to save:"
    run scancel JOB
    return
  fi
  jobs=$(queue "$1") || fail "squeue cannot say whether $1 is there"
  while read -r job state; do
    if [[ -z $job ]]; then
      say "$1: not there"
    elif [[ $state == RUNNING ]]; then
      scontrol update JobId="$job" Requeue=0
      scancel --signal=TERM "$job" # to the processes, not to the job's script
    else
      scancel "$job"
    fi
  done <<<"$jobs"
}

delete_unit() {
  run scancel --user="${USER:-$(id -un)}" --name="$1"
}

for_each_unit "${action}_unit"
