#!/usr/bin/env bash
# Trains on Cloud TPU slices, one for each work unit, by queued resources.
#
#   launch/tpu_vm.sh launch --config=configs/celeba64.py \
#     --workdir=gs://BUCKET/faces --type=v5litepod-8 --spot
#   launch/tpu_vm.sh launch --config=configs/cifar10.py \
#     --sweep=configs/sweeps/seeds.py --workdir=gs://BUCKET/seeds --spot
#
# asks for the slices, waits for them, copies this folder to all hosts, installs
# it there and trains. A slice that is preempted is deleted and asked for again,
# and the same command goes on from its last checkpoint. A slice whose run is
# done is deleted; one whose run fails three times, or ends with an error that
# another start would meet again, is kept to look at.
# `launch` stays until the end. If it is interrupted, the slices go on; the same
# command finds them again.
#
# Also, with the same flags, or with --name=RESOURCE for a single one:
#   launch/tpu_vm.sh watch ...   what they print; of a single one, follow it
#   launch/tpu_vm.sh fetch ...   copy the workdirs into runs/RESOURCE
#   launch/tpu_vm.sh stop ...    save and end; the slices stay, and cost
#   launch/tpu_vm.sh delete ...  delete the slices; the workdirs stay
#
# Flags:
#   --config, --sweep, --workdir, --config.FIELD   as in launch/units.py
#   --dry-run             print all commands and run none
#   --name=vitgan         what the names of the resources begin with
#   --type=v5litepod-8    accelerator type, as gcloud calls it
#   --zone=us-central1-a  --project=PROJECT (default: that of gcloud)
#   --spot                cheaper, and may be preempted
#   --runtime=VERSION     of the TPU's software; default: the one of the type
#
# It needs gcloud, logged in, and a bucket that the slices' service account may
# write. A key for ssh with a passphrase needs `ssh-add` before.

source "$(dirname "$0")/lib.sh"
actions="launch watch fetch stop delete"
flags="type zone project spot runtime"
type=v5litepod-8
zone=us-central1-a
project=
spot=false
runtime=
parse "$@"

if [[ -z $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--type=$type is none of v2-, v3-, v4-, v5litepod-, v5p- and" \
      "v6e-<cores>: give --runtime as well" ;;
  esac
fi
place=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")
archive=/tmp/vitgan.tgz

tpus() { run gcloud compute tpus "$@" "${place[@]}"; }

# An empty line where there is none, and an error only for an error.
state() {
  tpus queued-resources list --format="value(state.state)" \
    --filter="name~/queuedResources/$1\$"
}

node_state() {
  tpus tpu-vm list --format="value(state)" --filter="name~/nodes/$1\$"
}

create() {
  local words=(--node-id="$1" --accelerator-type="$type"
    --runtime-version="$runtime")
  ! $spot || words+=(--spot)
  tpus queued-resources create "$1" "${words[@]}"
}

remove() { tpus queued-resources delete "$1" --force --quiet; }

on_hosts() { tpus tpu-vm ssh "$1" --worker="$2" --command="$3"; }

status() {
  on_hosts "$1" all "if [ -e vitgan/launch ]; then \
bash vitgan/launch/host.sh status; else echo vitgan: new; fi"
}

pack() {
  run tar -czf "$archive" --exclude=__pycache__ README.md configs \
    constraints.txt launch setup.py vitgan_jax
}

start() {
  tpus tpu-vm scp "$archive" "$1:vitgan.tgz" --worker=all
  on_hosts "$1" all "mkdir -p vitgan && tar -xzf vitgan.tgz -C vitgan && \
bash vitgan/launch/host.sh install tpu && \
bash vitgan/launch/host.sh start $2"
}

show_launch() {
  need_bucket "$2"
  say "Every $POLL_SECONDS s, the state of $1:"
  state "$1"
  say "If there is none:"
  create "$1"
  say "If it is SUSPENDED or FAILED, or the node was PREEMPTED, again:"
  node_state "$1"
  remove "$1"
  create "$1"
  say "If it is ACTIVE, whether it runs, and if not, start or resume it:"
  status "$1"
  start "$1" "$3 --distributed"
  say "If all hosts are done:"
  remove "$1"
}

# Does what the state of a slice asks for, until its run is done.
keep_running() {
  local node=$1 command="$3 --distributed"
  local state report errors=0 failures=0 polls=0 first=true seen=false
  while true; do
    ((errors < 20)) || fail "$node: gcloud keeps failing, see above"
    report=
    if ! state=$(state "$node"); then
      errors=$((errors + 1))
    elif [[ $state == ACTIVE ]] && ! report=$(status "$node"); then
      errors=$((errors + 1))
      state=$(node_state "$node") || state=UNKNOWN
    fi
    if [[ -z $state ]] && $seen; then
      say "$node: somebody deleted it; the same command asks for it again"
      return
    fi
    case $state in
      '' | SUSPENDED | FAILED | PREEMPTED | TERMINATED)
        if [[ $state == FAILED ]]; then
          failures=$((failures + 1))
          ((failures < 3)) || fail "$node: the request failed three times; see" \
            "gcloud compute tpus queued-resources describe $node"
        fi
        say "$node: ${state:-none yet}; asking for it"
        seen=false
        [[ -z $state ]] || remove "$node" || errors=$((errors + 1))
        if create "$node"; then
          seen=true
        else
          errors=$((errors + 1))
        fi
        ;;
      ACTIVE)
        errors=0
        if grep -q "^vitgan: running" <<<"$report"; then
          polls=$((polls + 1))
          ((polls < 10)) || failures=0 # it did run: what comes now is new
        elif ! grep "^vitgan: " <<<"$report" | grep -qv "exit 0\$"; then
          say "$node: done; deleting it"
          remove "$node"
          return
        elif grep -q "^vitgan: stopped" <<<"$report" && ! $first; then
          say "$node: stopped; the same command goes on from there"
          return
        else
          # As vitgan_jax/cli.py has it: bad input, or a run that diverged.
          ! grep -q "^vitgan: exit 78\$" <<<"$report" ||
            fail "$node: the run cannot go on so; see watch --name=$node," \
              "then delete --name=$node"
          if grep -q "^vitgan: exit [^0]" <<<"$report"; then
            failures=$((failures + 1))
            ((failures < 3)) || fail "$node: the run failed three times; see" \
              "watch --name=$node, then delete --name=$node"
          fi
          say "$node: starting or resuming the run"
          polls=0
          start "$node" "$command" || errors=$((errors + 1))
        fi
        first=false
        ;;
      *) say "$node: $state" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

in_background() {
  need_bucket "$2"
  keep_running "$@" 3<&- &
  pids+=($!)
}

watch_unit() {
  say "$1:"
  state "$1"
  if [[ $num_units -eq 1 ]]; then
    on_hosts "$1" 0 "bash vitgan/launch/host.sh follow"
  else
    on_hosts "$1" 0 "bash vitgan/launch/host.sh tail" || say "not there yet"
  fi
}

stop_unit() { on_hosts "$1" all "bash vitgan/launch/host.sh stop"; }

delete_unit() {
  local found=unknown
  $dry_run || found=$(state "$1") || fail "gcloud cannot say whether $1 is there"
  if [[ -z $found ]]; then
    say "$1: not there"
  else
    remove "$1"
  fi
}

if [[ $action != launch ]]; then
  for_each_unit "${action}_unit"
elif $dry_run; then
  pack
  for_each_unit show_launch
else
  # Packed once: a slice that comes back runs what the first one ran.
  archive=$(mktemp)
  trap 'rm -f "$archive"' EXIT
  pids=()
  trap 'kill ${pids[@]+"${pids[@]}"} 2>/dev/null; exit 130' INT TERM
  pack
  for_each_unit in_background
  code=0
  for pid in "${pids[@]}"; do
    wait "$pid" || code=1
  done
  exit "$code"
fi
