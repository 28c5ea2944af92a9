#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, a JobSet for each work unit, by xpk.
#
#   xpk cluster create --cluster=CLUSTER --tpu-type=v5litepod-16 \
#     --num-slices=1 --spot --zone=ZONE --project=PROJECT
#   launch/gke.sh launch --config=configs/celeba64.py \
#     --workdir=gs://BUCKET/faces --cluster=CLUSTER --zone=ZONE \
#     --project=PROJECT --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/vitgan
#
# builds an image of this folder, pushes it and creates the JobSets that are not
# there; with --sweep=configs/sweeps/seeds.py one for each work unit. Kueue lets
# them wait for slices. What is preempted or dies is restarted by the cluster
# and goes on from its last checkpoint; what ends with an error that it would
# meet again fails.
#
# Also, with the same flags, or with --name=RESOURCE for a single one:
#   launch/gke.sh watch ...   states, and what the first hosts print
#   launch/gke.sh fetch ...   copy the workdirs into runs/RESOURCE
#   launch/gke.sh stop ...    save and end: the same as delete
#   launch/gke.sh delete ...  delete the JobSets, which lets them save first
# The workdirs stay, and so does the cluster, which costs:
#   xpk cluster delete --cluster=CLUSTER --zone=ZONE --project=PROJECT
#
# Flags:
#   --config, --sweep, --workdir, --config.FIELD   as in launch/units.py
#   --dry-run             print all commands and run none
#   --name=vitgan         what the names of the JobSets begin with
#   --cluster=vitgan      made by xpk
#   --type=v5litepod-16   TPU type, as xpk calls it
#   --image=IMAGE         where to push the image
#   --zone=us-central1-a  --project=PROJECT (default: that of gcloud)
#   --spot                on a cluster that provisions its own nodes; on another
#                         one, --spot of `xpk cluster create` decides
#   --max-restarts=50     of a JobSet, preemptions included
#
# It needs gcloud, kubectl and docker, logged in, and xpk
# (launch/requirements-xpk.txt, in an environment of its own).

source "$(dirname "$0")/lib.sh"
actions="launch watch fetch stop delete"
flags="cluster type image zone project spot max-restarts"
cluster=vitgan
type=v5litepod-16
image=
zone=us-central1-a
project=
spot=false
max_restarts=50
parse "$@"

place=(--cluster="$cluster" --zone="$zone")
[[ -z $project ]] || place+=(--project="$project")
built=false

xpk_workload() {
  local verb=$1
  shift
  run xpk workload "$verb" "${place[@]}" "$@"
}

# Says whether the list has a JobSet; others may have names that contain it.
is_listed() {
  local list
  list=$(xpk_workload list --filter-by-job="$1" --filter-by-status="$2") ||
    fail "xpk cannot list the workloads of $cluster: $list"
  awk -v name="$1" '$1 == name { found = 1 } END { exit !found }' <<<"$list"
}

build_once() {
  ! $built || return 0
  run docker build --file=launch/Dockerfile --tag="$image" .
  run docker push "$image"
  built=true
}

create() {
  # A crash, beside what xpk restarts upon: 42, and 127 on. 78 ends the JobSet.
  local words=(--workload="$1" --tpu-type="$type" --docker-image="$image"
    --max-restarts="$max_restarts" --restart-on-exit-codes=1
    --termination-grace-period-seconds=300)
  ! $spot || words+=(--spot)
  xpk_workload create "${words[@]}" \
    --command="exec bash launch/host.sh forward $2 --distributed"
}

launch_unit() {
  need_bucket "$2"
  [[ -n $image ]] ||
    fail "--image is required: where the cluster can pull it, as" \
      "REGION-docker.pkg.dev/PROJECT/REPOSITORY/vitgan"
  if $dry_run; then
    say "If $1 has failed, delete it first; if it is there otherwise, leave it:"
    xpk_workload list --filter-by-job="$1" --filter-by-status=FAILED
    xpk_workload delete --workload="$1" --force
    xpk_workload list --filter-by-job="$1" --filter-by-status=EVERYTHING
  elif is_listed "$1" FAILED; then
    say "$1: failed; starting it again"
    xpk_workload delete --workload="$1" --force
  elif is_listed "$1" EVERYTHING; then
    say "$1: is there already"
    return
  fi
  build_once
  create "$1" "$3"
}

watch_unit() {
  # It also lets kubectl know the cluster.
  xpk_workload list --filter-by-job="$1"
  local words=(--tail=50)
  [[ $num_units -gt 1 ]] || words+=(--follow)
  run kubectl logs --container=jax-tpu "${words[@]}" \
    --selector="xpk.google.com/workload=$1,batch.kubernetes.io/job-completion-index=0"
}

delete_unit() {
  if ! $dry_run && ! is_listed "$1" EVERYTHING; then
    say "$1: not there"
  else
    xpk_workload delete --workload="$1" --force
  fi
}

stop_unit() { delete_unit "$@"; }

for_each_unit "${action}_unit"
