# What runs on every host of launch/tpu_pod.sh, as its startup script: after each start, also of a machine that had been
# pre-empted. tpu_pod.sh puts these lines before it:
#   RUN=gs://...  SOURCE=aegis_jax-COMMIT.tar.gz  TOGETHER=true|false  NFS=SERVER:/SHARE or ''  NAME=...  WORK=...
#   COMMAND=(...)
# shellcheck shell=bash disable=SC2153
set -euo pipefail
export HOME=/root
mkdir -p "$WORK"
cd "$WORK"
exec >>"$WORK/log" 2>&1
host=$(hostname -s)
say() { echo "$(date -u +%FT%TZ) $host: $1"; }

metadata() {
  curl -sf -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Whether nothing is left to do for any. Of hosts that work together the end of one is all's; a worker of a batch that ends
# with 0 or 1 has seen everything settled, but one that could not work (2) says nothing of the others.
is_over() {
  if $TOGETHER; then
    gcloud storage ls "$RUN/exit/**" >/dev/null 2>&1
  else
    gcloud storage cat "$RUN/exit/**" 2>/dev/null | grep -qE '^[01] '
  fi
}

insist() {
  until "$@"; do
    say "failed, again in 30 seconds: $*"
    sleep 30
  done
}

# The images' own Python may be older than aegis_jax wants.
install() {
  apt-get -q update && apt-get -qy install python3-venv nfs-common &&
    gcloud storage cp "$RUN/$SOURCE" . &&
    { ! gcloud storage ls "$RUN/send/**" >/dev/null 2>&1 || gcloud storage cp "$RUN/send/**" .; } &&
    mkdir -p source && tar -xzf "$SOURCE" -C source &&
    python3 -m venv uv && uv/bin/pip -q install uv==0.13.8 &&
    uv/bin/uv venv -q --clear --python 3.12 venv &&
    uv/bin/uv pip install -q --python venv/bin/python -c source/requirements.lock './source[tpu]' &&
    touch "ready-$SOURCE"
}

send_log() { gcloud storage cp -q "$WORK/log" "$RUN/logs/$host.log" >/dev/null 2>&1 || true; }

say started
if is_over; then
  say "this run is over"
  exit 0
fi
while sleep 60; do send_log; done &
sending=$!
trap 'kill "$sending" 2>/dev/null || true; send_log' EXIT

[[ -e ready-$SOURCE ]] || insist install
export PATH=$WORK/venv/bin:$PATH AEGIS_CACHE_DIR=$WORK/cache
if [[ -n $NFS ]]; then
  mkdir -p /shared
  mountpoint -q /shared || insist mount -t nfs "$NFS" /shared
  AEGIS_CACHE_DIR=/shared/cache
fi

number=0
if $TOGETHER; then
  # Said in full, since JAX by itself knows only the metadata of the older API.
  mapfile -t addresses < <(metadata worker-network-endpoints | tr , '\n' | grep -oE '([0-9]{1,3}\.){3}[0-9]{1,3}')
  number=$(metadata agent-worker-number || metadata worker-id)
  export AEGIS_NUM_PROCESSES=${#addresses[@]} AEGIS_PROCESS_ID=$number JAX_COORDINATOR_ADDRESS=${addresses[0]}:8476
fi

trap : TERM # at shutdown it comes to the command as well, and that ends by it
tries=0
while true; do
  code=0
  "${COMMAND[@]}" || code=$?
  say "ended with $code"
  if ((code <= 128)); then
    # Of several that are done the first says so, once the results are in the bucket.
    ((code || number == 0)) || exit 0
    if ((code == 0)) && [[ -n $NFS ]]; then insist gcloud storage rsync -q -r "/shared/$NAME" "$RUN/out"; fi
    echo "$code $host" >code
    insist gcloud storage cp -q code "$RUN/exit/$host"
    exit 0
  fi
  is_over && exit 0
  tries=$((tries + 1))
  sleep $((tries < 30 ? tries * 10 : 300))
done
