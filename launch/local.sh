#!/usr/bin/env bash
# launch/local.sh [--dry-run] N COMMAND...
#
# Runs N copies of a command on this machine, each with its share of the cores, e.g.
#
#   launch/local.sh 4 aegis batch plan.csv --model world --out runs/batch
#
# A copy that is ended by a signal (killed, out of memory, pre-empted), or by an error of no known kind (134), is started
# again, each time a second later than the last, up to 30; one that ends by itself is not: 0 is done, 1 is concepts that
# failed for good, 2 is something to mend. SIGTERM and Ctrl-C are handed on to all copies.
# Its own exit code is the largest of theirs. --dry-run prints what would be run.
set -euo pipefail

usage() {
  echo "usage: launch/local.sh [--dry-run] N COMMAND..." >&2
  exit 2
}

dry=false
if [[ ${1-} == --dry-run ]]; then
  dry=true
  shift
fi
[[ ${1-} =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || usage
count=$1
shift

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=$((cores / count > 0 ? cores / count : 1))
# PJRT_NPROC: XLA's threads. OMP_NUM_THREADS: those of NumPy's and PyTorch's libraries.
share=(env "PJRT_NPROC=$threads" "OMP_NUM_THREADS=$threads")

if $dry; then
  for ((k = 1; k <= count; k++)); do
    printf '[%s]' "$k"
    printf ' %q' "${share[@]}" "$@"
    printf '\n'
  done
  exit 0
fi

# One copy, until it ends by itself. In a subshell of its own, with its own traps.
keep_running() {
  local name=$1 child='' code pause=0 stopped=false
  shift
  # The child may have ended, which is no reason to end with the code of `kill`.
  trap 'stopped=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  trap '' INT # of the terminal's Ctrl-C; the parent hands on TERM instead
  while true; do
    "${share[@]}" "$@" &
    child=$!
    if $stopped; then kill -TERM "$child" 2>/dev/null || true; fi # it came before there was a child to hand it on to
    while true; do # wait returns early when a signal comes
      code=0
      wait "$child" 2>/dev/null || code=$?
      kill -0 "$child" 2>/dev/null || break
    done
    if ((code <= 128)) || $stopped; then
      exit "$code"
    fi
    pause=$((pause < 30 ? pause + 1 : 30))
    echo "copy $name ended with $code, starting it again in $pause s"
    sleep "$pause" &
    child=$! # which a signal ends too, also one that came before it
    if $stopped; then kill -TERM "$child" 2>/dev/null || true; fi
    wait "$child" || true
    $stopped && exit 143
  done
}

# Marks the lines of a copy, and outlives it until all are printed.
marked() {
  trap '' INT TERM
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
copies=() markers=()
for ((k = 1; k <= count; k++)); do
  mkfifo "$pipes/$k"
  marked "$k" <"$pipes/$k" &
  markers+=($!)
  keep_running "$k" "$@" >"$pipes/$k" 2>&1 &
  copies+=($!)
done
trap 'kill -TERM "${copies[@]}" 2>/dev/null || true' TERM INT

worst=0
for copy in "${copies[@]}"; do
  while true; do
    code=0
    wait "$copy" || code=$?
    kill -0 "$copy" 2>/dev/null || break
  done
  ((code > worst)) && worst=$code
done
wait "${markers[@]}"
exit "$worst"
