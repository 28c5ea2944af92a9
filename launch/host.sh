#!/usr/bin/env bash
# What the launchers do on a machine that trains; not for use by hand.
#
#   host.sh install tpu|cuda  makes .venv, with Python 3.11 and this package
#   host.sh run COMMAND...    runs it; its exit code, 143 if it was stopped
#   host.sh forward COMMAND...  the same where a signal comes to this alone
#   host.sh start COMMAND...  runs it in the background, once at a time
#   host.sh status            running, stopped, exit CODE, or new
#   host.sh follow | tail     its output
#   host.sh stop              lets it save and end

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PWD/.venv/bin:$HOME/.local/bin:$PATH
STATE=.host
# Huge pages, unless the user has options of his own: a gain on CPUs.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}

install() {
  local wanted
  wanted=$1\ $(cat setup.py constraints.txt | cksum)
  [[ $(cat .venv/installed-here 2>/dev/null) != "$wanted" ]] || return 0
  # The machines' own Python may be older than 3.11; uv brings one.
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x .venv/bin/python ]] || uv venv --python 3.11 .venv
  uv pip install --python .venv/bin/python --constraint constraints.txt \
    --editable ".[$1]"
  printf %s "$wanted" >.venv/installed-here
}

# SIGTERM has the run save and end; this waits for it.
run() {
  local forward=$1 child code
  shift
  "$@" &
  child=$!
  [[ ! -d $STATE ]] || echo "$child" >"$STATE/pid"
  # Where the run gets the signal as well, a second one would cut its saving.
  # shellcheck disable=SC2064
  trap "! $forward || kill -TERM $child 2>/dev/null || true" TERM
  while true; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  return "$code"
}

# The lock stays with the run, however that is left behind.
start() {
  mkdir -p "$STATE"
  exec 9>"$STATE/lock"
  if ! flock --nonblock 9; then
    echo "It is running already"
    return
  fi
  rm -f "$STATE/exit" "$STATE/stopped"
  nohup setsid bash launch/host.sh hold "$@" >>"$STATE/log" 2>&1 </dev/null &
}

hold() {
  local code=0
  run false "$@" || code=$?
  echo "$code" >"$STATE/exit"
}

status() {
  if [[ -e $STATE/lock ]] && ! flock --nonblock "$STATE/lock" true; then
    echo "vitgan: running"
  elif [[ -e $STATE/stopped ]]; then
    echo "vitgan: stopped"
  elif [[ -e $STATE/exit ]]; then
    echo "vitgan: exit $(cat "$STATE/exit")"
  else
    echo "vitgan: new"
  fi
}

stop() {
  if [[ $(status) == *running ]]; then
    touch "$STATE/stopped"
    kill -TERM "$(cat "$STATE/pid")"
  fi
}

action=$1
shift
case $action in
  run) run false "$@" ;;
  forward) run true "$@" ;;
  follow) tail -n 50 -F "$STATE/log" ;;
  tail) tail -n 3 "$STATE/log" ;;
  *) "$action" "$@" ;;
esac
