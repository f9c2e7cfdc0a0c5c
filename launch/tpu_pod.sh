#!/usr/bin/env bash
# launch/tpu_pod.sh [--dry-run] up|status|logs|collect|delete OPTIONS [-- aegis batch|erase ...]
#
#   launch/tpu_pod.sh up --name art --zone us-east5-b --tpu v6e --topology 2x4 --slices 16 --run gs://BUCKET/art \
#     --send plan.csv -- aegis batch plan.csv --model CompVis/stable-diffusion-v1-4 --config sd14 --config.trainable=xattn
#   launch/tpu_pod.sh up --name gogh --zone us-east5-a --tpu v5p --topology 2x2x4 --run gs://BUCKET/gogh \
#     --nfs 10.0.0.2:/share -- aegis erase --model CompVis/stable-diffusion-v1-4 --config sd14 --concept 'Van Gogh' \
#     --config.mesh.fsdp=16 --config.batch=16
#
# up       creates the machines, or finds those that are there, and waits until the run is over; then deletes them. What
#          is pre-empted is created again; it goes on by itself, since the work is the machines' startup script. Ends with
#          the run's own exit code. It may be stopped and called again: the machines go on (and cost) meanwhile, with the
#          command that they were created with.
# status   prints the state of each; logs: their last lines and what comes; collect DIR: the results; delete: the machines,
#          and what the bucket says of the run's end, so that the same name can begin anew. Results stay.
#
# Options, the same for all:
#   --name NAME        of the machines          --zone ZONE
#   --tpu TYPE         v5e (by queued resources, Cloud TPU's older API, the only one that has it), v5p, v6e, tpu7x (by
#                      instance groups of Compute Engine)
#   --topology AxB     of a slice; aegis batch wants slices of one host: v5e, v6e 1x1, 2x2, 2x4, v5p, tpu7x 2x2x1
#   --slices N         aegis batch: so many workers (default 1)
#   --run gs://...     a folder of a bucket for this run: this checkout's last commit, which is what is installed, logs,
#                      exit codes, and results (--out is added)
#   --nfs SERVER:/SHARE  aegis erase: what all hosts share, mounted at /shared; --out /shared/NAME and --auto-resume are
#                      added
#   --send FILE        goes to every host's working folder; more than once for more
#   --on-demand        instead of spot machines
#   --keep             up does not delete the machines at the end
# --dry-run prints what would be done if nothing were there yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

refuse() {
  echo "tpu_pod.sh: error: $1" >&2
  exit 2
}

dry=false
if [[ ${1-} == --dry-run ]]; then
  dry=true
  shift
fi
action=${1-} name='' zone='' tpu='' topology='' slices=1 run='' nfs='' folder='' spot=true keep=false
send=() command=()
[[ $action =~ ^(up|status|logs|collect|delete)$ ]] || refuse "wanted up, status, logs, collect or delete; see the top of $0"
shift
while (($#)); do
  case $1 in
    --name | --zone | --tpu | --topology | --slices | --run | --nfs)
      (($# > 1)) || refuse "$1 wants a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --send)
      [[ -f ${2-} ]] || refuse "--send ${2-}: no such file"
      send+=("$2")
      shift
      ;;
    --on-demand) spot=false ;;
    --keep) keep=true ;;
    --)
      shift
      command=("$@")
      break
      ;;
    -*) refuse "unknown option $1" ;;
    *)
      [[ $action == collect && -z $folder ]] || refuse "unknown argument $1"
      folder=$1
      ;;
  esac
  shift
done
for option in name zone tpu topology run; do [[ -n ${!option} ]] || refuse "--$option is missing"; done
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || refuse "--name $name: wanted small letters, digits and -, 40 at most"
[[ $run == gs://?*/?* ]] || refuse "--run $run: wanted gs://BUCKET/FOLDER"
[[ $slices =~ ^[1-9][0-9]*$ ]] || refuse "--slices $slices: wanted a number"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || refuse "--topology $topology: wanted such as 2x4 or 2x2x1"
run=${run%/} region=${zone%-*} chips=$((${topology//x/*}))

# Machines of several hosts have four chips each.
host_folder=/var/lib/aegis api=mig hosts=$(((chips + 3) / 4)) image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e machine=''
case $tpu:$chips in
  v5e:*) api=queued ;;
  v6e:1 | v6e:4 | v6e:8) machine=ct6e-standard-${chips}t ;;
  v6e:*) machine=ct6e-standard-4t ;;
  v5p:*) machine=ct5p-hightpu-4t ;;
  tpu7x:*) machine=tpu7x-standard-4t image=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
  *) refuse "--tpu $tpu: wanted v5e, v5p, v6e or tpu7x" ;;
esac
case $tpu in
  v5e | v6e) ((chips > 8)) || hosts=1 ;;
  *) ((chips > 1)) || hosts=0 ;;
esac
((chips % 4 == 0 || (chips == 1 && hosts == 1))) ||
  refuse "--topology $topology: $chips chips; wanted a multiple of 4, or 1x1 of v5e or v6e"
together=$( ((hosts > 1)) && echo true || echo false)

if [[ $action == up ]]; then
  [[ " ${command[*]} " != *" --out"* ]] || refuse "--out is added by this script: results are in $run"
  case "${command[*]:0:2}" in
    "aegis batch")
      ! $together || refuse "aegis batch wants slices of one host: $topology of $tpu has $hosts; more --slices instead"
      command+=(--out "$run/out")
      ;;
    "aegis erase")
      [[ -n $nfs ]] || refuse "aegis erase wants --nfs: a run folder that outlives machines, and that all hosts share"
      ((slices == 1)) || refuse "--slices $slices: aegis erase works on one slice"
      command+=(--out "/shared/$name" --auto-resume)
      ;;
    *) refuse "the command to run is missing: -- aegis batch ... or -- aegis erase ..." ;;
  esac
fi
[[ $action != collect || -n $folder ]] || refuse "collect wants a folder: where to"

try() {
  if $dry; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

must() { try "$@" || refuse "that failed: $*; if something is left from before, 'delete' first"; }

# Asks, which a dry run does not do: nothing is there.
ask() { ! $dry && "$@" 2>"$work/error"; }

# What a question that was not answered means: only what is known not to be there may be created.
unanswered() {
  if $dry || grep -qiE 'not[ _]found' "$work/error"; then
    echo ABSENT
  else
    echo "UNKNOWN: $(tail -n 1 "$work/error")"
  fi
}

# --- queued resources: one for each slice, NAME-0, NAME-1, ...; its machines have the same name ---

queued_state() {
  ask gcloud compute tpus queued-resources describe "$name-$1" --zone="$zone" --format='value(state.state)' || unanswered
}

queued_create() {
  local more=()
  if $spot; then more+=(--spot); fi
  must gcloud compute tpus queued-resources create "$name-$1" --zone="$zone" --node-id="$name-$1" \
    --accelerator-type="v5litepod-$chips" --runtime-version=v2-alpha-tpuv5-lite "${more[@]}" \
    --metadata-from-file="startup-script=$startup" --quiet
}

queued_delete() { try gcloud compute tpus queued-resources delete "$name-$1" --zone="$zone" --force --quiet; }

queued_ssh() { try gcloud compute tpus tpu-vm ssh "$name-$1" --zone="$zone" --worker=all --command="$2"; }

# --- a managed instance group: of all slices of one host, which it keeps running itself, or of the hosts of one slice ---

mig_state() {
  local states count=0
  ask gcloud compute instance-groups managed describe "$name" --zone="$zone" >/dev/null || { unanswered && return; }
  states=$(ask gcloud compute instance-groups managed list-instances "$name" --zone="$zone" \
    --format='value(instanceStatus)') || { unanswered && return; }
  count=$(grep -c RUNNING <<<"$states" || true)
  if $together && grep -qE 'STOP|TERMINATED|SUSPEND' <<<"$states"; then
    echo SUSPENDED
  elif ((count == hosts * slices)); then
    echo ACTIVE
  else
    echo "WAITING ($count of $((hosts * slices)) run)"
  fi
}

mig_create() {
  local model=(--provisioning-model=STANDARD) more=() project
  if $spot; then model=(--provisioning-model=SPOT --instance-termination-action=STOP); fi
  if $together; then
    must gcloud compute resource-policies create workload-policy "$name" --region="$region" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$topology" --quiet
    # A slice that has lost a host is of no use, and is replaced as a whole.
    project=$(ask gcloud config get-value project || echo PROJECT)
    more=(--workload-policy="projects/$project/regions/$region/resourcePolicies/$name"
      --default-action-on-vm-failure=do-nothing)
  fi
  must gcloud compute instance-templates create "$name" --machine-type="$machine" --maintenance-policy=TERMINATE \
    "${model[@]}" --image-project=ubuntu-os-accelerator-images --image-family="$image" \
    --boot-disk-size=200GB --scopes=cloud-platform --metadata-from-file="startup-script=$startup" --quiet
  must gcloud compute instance-groups managed create "$name" --zone="$zone" --template="$name" --size=$((hosts * slices)) \
    "${more[@]}" --quiet
}

# In this order, since each is in use by the one before.
mig_delete() {
  try gcloud compute instance-groups managed delete "$name" --zone="$zone" --quiet
  try gcloud compute instance-templates delete "$name" --quiet
  if $together; then try gcloud compute resource-policies delete "$name" --region="$region" --quiet; fi
}

mig_ssh() {
  local machine machines pids=()
  machines=$(ask gcloud compute instance-groups managed list-instances "$name" --zone="$zone" --format='value(NAME)') ||
    $dry || refuse "$(tail -n 1 "$work/error")"
  for machine in $machines; do
    try gcloud compute ssh "$machine" --zone="$zone" --command="$2" 2>&1 | sed "s/^/[$machine] /" &
    pids+=($!)
  done
  wait "${pids[@]}"
}

# Numbers of what is created and lost as one.
parts() { if [[ $api == queued ]]; then seq 0 $((slices - 1)); else echo 0; fi; }

# The run's exit code; fails while it goes on. Hosts that work together end as one. A worker of a batch that ends with 0 or
# 1 has seen everything settled; another code is its own trouble, and the run's when all workers have ended so.
finished() {
  local codes
  codes=$(ask gcloud storage cat "$run/exit/**" | awk '{print $1}' | sort -rn)
  if ! $together && grep -qx '[01]' <<<"$codes"; then codes=$(grep -x '[01]' <<<"$codes"); fi
  if ! $together && ! grep -qx '[01]' <<<"$codes" && (($(grep -c . <<<"$codes") < slices)); then return 1; fi
  head -n 1 <<<"$codes" | grep .
}

stage() {
  local commit archive
  commit=$(git -C "$here" rev-parse --short=12 HEAD)
  [[ -z $(git -C "$here" status --porcelain --untracked-files=no) ]] ||
    echo "note: what is not committed is not installed; $commit is" >&2
  archive=aegis_jax-$commit.tar.gz
  must git -C "$here/.." archive --format=tar.gz --output="$work/$archive" HEAD
  must gcloud storage cp "$work/$archive" "$run/$archive"
  ((${#send[@]} == 0)) || must gcloud storage cp "${send[@]}" "$run/send/"
  startup=$work/startup.sh
  {
    echo '#!/usr/bin/env bash'
    printf '%s=%q\n' RUN "$run" SOURCE "$archive" TOGETHER "$together" NFS "$nfs" NAME "$name" WORK "$host_folder"
    printf 'COMMAND=('
    printf '%q ' "${command[@]}"
    printf ')\n'
    cat "$here/tpu_host.sh"
  } >"$startup"
  ! $dry || { echo "# $startup, before launch/tpu_host.sh:" && sed -n '2,/^COMMAND/p' "$startup"; }
}

delete() {
  local k
  for k in $(parts); do "${api}_delete" "$k" || true; done
}

up() {
  local k state code before=()
  if code=$(finished); then
    echo "this run is over, exit code $code; 'delete' lets the same name begin anew"
    return "$code"
  fi
  stage
  while true; do
    for k in $(parts); do
      state=$("${api}_state" "$k")
      [[ $state == "${before[k]-}" ]] || $dry || echo "$name-$k: $state"
      before[k]=$state
      case $state in
        ABSENT) "${api}_create" "$k" ;;
        SUSPENDED) # pre-empted; such are never given back, only replaced
          "${api}_delete" "$k" || continue
          "${api}_create" "$k"
          ;;
        FAILED) refuse "$name-$k could not be made: gcloud compute tpus queued-resources describe $name-$k --zone=$zone" ;;
      esac
    done
    if $dry; then
      echo "# until $run/exit/** says how the run has ended; then:"
      code=0
      break
    fi
    sleep 30
    if code=$(finished); then break; fi
  done
  $keep || delete
  $dry || echo "the run is over, exit code $code; results: $run/out, logs: $run/logs"
  return "$code"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $action in
  up) up ;;
  status) for k in $(parts); do echo "$name-$k: $("${api}_state" "$k")"; done ;;
  logs)
    for k in $(parts); do "${api}_ssh" "$k" "tail -n 100 -F $host_folder/log" & done
    wait
    ;;
  collect) must gcloud storage rsync -r "$run/out" "$folder" ;;
  delete)
    delete
    try gcloud storage rm -r "$run/exit" || true
    ;;
esac
