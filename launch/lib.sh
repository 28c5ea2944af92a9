# shellcheck shell=bash
# What the launchers share. A launcher sources this, sets `actions`, `flags`
# (names of its own flags) and a default in a variable for each, and calls
# `parse "$@"`. A flag whose default is `false` needs no value.

# shellcheck disable=SC2154

set -euo pipefail
SCRIPT=$(cd "$(dirname "$0")" && pwd)/${0##*/}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
POLL_SECONDS=${POLL_SECONDS:-30}
name=vitgan
dry_run=false
unit_flags=()

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the comment that a launcher begins with.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$SCRIPT"; }

parse() {
  action=${1:---help}
  case $action in --help | -h | help) usage && exit ;; esac
  [[ " $actions " == *" $action "* ]] ||
    fail "no such action: $action; give one of: $actions; see --help"
  shift
  local word key variable
  for word in "$@"; do
    case $word in
      --help) usage && exit ;;
      --dry-run) dry_run=true ;;
      --config=* | --config.*=* | --sweep=* | --workdir=*)
        unit_flags+=("$word")
        ;;
      --*)
        key=${word%%=*}
        key=${key#--}
        [[ " name $flags " == *" $key "* ]] ||
          fail "no such flag: --$key; see --help"
        variable=${key//-/_}
        if [[ $word == *=* ]]; then
          printf -v "$variable" %s "${word#*=}"
        elif [[ ${!variable} == false ]]; then
          printf -v "$variable" true
        else
          fail "--$key needs a value: --$key=...; see --help"
        fi
        ;;
      *) fail "not a flag: $word; see --help" ;;
    esac
  done
  [[ ${#unit_flags[@]} -gt 0 || ($action != launch && $action != fetch) ]] ||
    fail "--config=configs/<name>.py is required; see --help"
  [[ $name =~ ^[a-zA-Z] ]] || fail "--name=$name must begin with a letter"
}

# Prints words as one line that a shell reads as these words again.
quote() {
  local word line='' escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] ||
      word="'${word//"'"/$escaped}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or prints it with --dry-run.
run() {
  if $dry_run; then
    quote "$@"
  else
    "$@"
  fi
}

# Tells what happens; with --dry-run as a comment, so that all can be pasted.
say() {
  if $dry_run; then
    printf '# %s\n' "$*"
  else
    printf '%s\n' "$*"
  fi
}

# Prints the name of a work unit's resources: 40 letters, digits and hyphens,
# which Google Cloud, Kubernetes, SkyPilot and Slurm take. Two units never get
# one name: where more than `=` changes, a checksum of the whole is added.
resource_name() {
  local whole=$name${1:+-$1} safe sum
  safe=$(printf %s "$whole" | LC_ALL=C tr A-Z= a-z- |
    LC_ALL=C tr -c a-z0-9- -)
  if [[ $safe != "${whole//=/-}" || ${#safe} -gt 40 || $safe == *- ]]; then
    sum=$(printf %s "$whole" | cksum | cut -d ' ' -f 1)
    safe=${safe:0:29}-$sum
  fi
  printf '%s\n' "$safe"
}

# Calls a function for each work unit, with the name of its resources, its
# workdir and its command. Without --config, --name is the one resource.
for_each_unit() {
  local lines unit workdir command
  if [[ ${#unit_flags[@]} -eq 0 ]]; then
    num_units=1
    "$1" "$(resource_name '')" '' ''
    return
  fi
  lines=$("$PYTHON" -m launch.units "${unit_flags[@]}") || exit
  # Read by the launchers that source this.
  # shellcheck disable=SC2034
  num_units=$(wc -l <<<"$lines")
  while IFS=$'\t' read -r -u 3 unit workdir command; do
    "$1" "$(resource_name "$unit")" "$workdir" "$command"
  done 3<<<"$lines"
}

# Ends the launcher unless a workdir is where every host can write.
need_bucket() {
  [[ $1 == gs://* ]] || fail "workdir $1 would be lost with the machine: give" \
    "--workdir=gs://BUCKET/FOLDER"
}

fetch_unit() {
  need_bucket "$2"
  run mkdir -p "runs/$1"
  run gcloud storage rsync --recursive "$2" "runs/$1"
}
