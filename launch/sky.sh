#!/usr/bin/env bash
# Trains on TPU slices or GPUs of a cloud, a managed job for each work unit, by
# SkyPilot.
#
#   launch/sky.sh launch --config=configs/celeba64.py \
#     --workdir=gs://BUCKET/faces --type=tpu-v5litepod-8
#   launch/sky.sh launch --config=configs/cifar10.py \
#     --sweep=configs/sweeps/seeds.py --workdir=gs://BUCKET/seeds \
#     --type=A100:8 --nodes=2
#
# SkyPilot looks for a zone that has the machines, copies this folder there,
# installs it and trains, on spot machines unless --on-demand is given. A job
# that is preempted gets other machines and goes on from its last checkpoint.
# The machines are deleted when a job is done. What a job is, is in
# launch/sky_tpu.yaml and launch/sky_gpu.yaml.
#
# Also, with the same flags, or with --name=RESOURCE for a single one:
#   launch/sky.sh watch ...   states, and what a single one prints
#   launch/sky.sh fetch ...   copy the workdirs into runs/RESOURCE
#   launch/sky.sh stop ...    end the jobs: the same as delete
#   launch/sky.sh delete ...  end the jobs and delete their machines; launched
#                             again, they go on from their last checkpoints
# The workdirs stay. So does SkyPilot's controller, a small machine that costs
# while it is up: `sky status` shows it, `sky down` deletes it.
#
# Flags:
#   --config, --sweep, --workdir, --config.FIELD   as in launch/units.py
#   --dry-run               print all commands and run none
#   --name=vitgan           what the names of the jobs begin with
#   --type=tpu-v5litepod-8  as `sky gpus list` calls it; tpu-... or GPU:COUNT
#   --nodes=1               machines of GPUs; a TPU slice is one
#   --infra=gcp             or gcp/REGION/ZONE; another cloud needs a way of its
#                           own to write to gs://
#   --on-demand             dearer, and not preempted
#
# It needs SkyPilot (launch/requirements-sky.txt, in an environment of its own)
# and a cloud that `sky check` finds; for `fetch`, gcloud.

source "$(dirname "$0")/lib.sh"
actions="launch watch fetch stop delete"
flags="type nodes infra on-demand"
type=tpu-v5litepod-8
nodes=1
infra=gcp
on_demand=false
parse "$@"

if [[ $type == tpu-* ]]; then
  task=launch/sky_tpu.yaml
  [[ $nodes -eq 1 ]] || fail "--nodes is for GPUs: a larger --type has more hosts"
else
  task=launch/sky_gpu.yaml
fi

queue() { run sky jobs queue --skip-finished --all --output=json; }

is_queued() {
  local jobs
  jobs=$(queue) || fail "sky cannot list the jobs, see above"
  "$PYTHON" -c 'import json, sys
sys.exit(all(x["job_name"] != sys.argv[1] for x in json.load(sys.stdin)))' \
    "$1" <<<"$jobs"
}

launch_unit() {
  need_bucket "$2"
  local spot=--use-spot
  ! $on_demand || spot=--no-use-spot
  if $dry_run; then
    say "If $1 is there, it is left alone:"
    queue
  elif is_queued "$1"; then
    say "$1: is there already"
    return
  fi
  run sky jobs launch --yes --detach-run --name="$1" --infra="$infra" \
    --gpus="$type" --num-nodes="$nodes" "$spot" --env="COMMAND=$3" "$task"
}

watch_unit() {
  if [[ $num_units -eq 1 ]]; then
    run sky jobs logs --name="$1"
  else
    say "$1:"
    run sky jobs logs --name="$1" --no-follow --tail=3 || say "not there yet"
  fi
}

delete_unit() {
  if ! $dry_run && ! is_queued "$1"; then
    say "$1: not there"
  else
    run sky jobs cancel --yes --name="$1"
  fi
}

stop_unit() { delete_unit "$@"; }

[[ $action != watch ]] || run sky jobs queue
for_each_unit "${action}_unit"
