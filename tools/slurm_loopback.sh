#!/usr/bin/env bash
# tools/slurm_loopback.sh start|stop DIR
#
# A SLURM of two nodes, n1 and n2, both this machine, to try launch/slurm.sbatch on: from Debian's packages, unpacked into
# DIR and not installed. Runs as root, listens on loopback's ports 26817, 26821 and 26822. Then
#
#   . DIR/env; sbatch ...
#
# JAX's coordinator is fixed there (port 26830), since the names n1 and n2 mean nothing to the network: one job of
# several nodes at a time. Exit code 3: no SLURM can be had here; the reason is the last line.
set -euo pipefail

[[ $# -eq 2 && ($1 == start || $1 == stop) ]] || { echo "usage: tools/slurm_loopback.sh start|stop DIR" >&2; exit 2; }
dir=$(realpath -m "$2")

if [[ $1 == stop ]]; then
  if [[ -e $dir/env ]]; then # what still runs would outlive its daemons
    # shellcheck source=/dev/null
    . "$dir/env"
    scancel --quiet --user=root 2>/dev/null || true
    for ((k = 0; k < 40; k++)); do
      [[ -n $(squeue -h 2>/dev/null) ]] || break
      sleep 1
    done
  fi
  for name in n1 n2 ctld munged; do
    if [[ -s $dir/run/$name.pid ]]; then kill "$(cat "$dir/run/$name.pid")" 2>/dev/null || true; fi
  done
  exit 0
fi

unavailable() {
  echo "no SLURM here: $1" >&2
  exit 3
}
((EUID == 0)) || unavailable "only root can start its daemons"
command -v apt-get >/dev/null || unavailable "no Debian"

mkdir -p "$dir"/{packages,etc,run,log,state,spool/n1,spool/n2}
cd "$dir/packages"
# Those whose names Debian 12 has; libmunge2 and what follows are the libraries they need.
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
  libmunge2 libhwloc15 libpmix2 libfreeipmi17 libipmimonitoring6 librrd8 libjson-c5 libhttp-parser2.9 libyaml-0-2
  liblua5.3-0 libjwt0 libmariadb3 libnuma1 liblz4-1)
if ! compgen -G '*.deb' >/dev/null; then
  apt-get -qq download "${packages[@]}" >"$dir/log/download" 2>&1 || {
    rm -f ./*.deb
    unavailable "apt-get download: $(tail -n 1 "$dir/log/download")"
  }
fi
for package in *.deb; do dpkg -x "$package" "$dir"; done

cd "$dir"
lib=$dir/usr/lib/$(dpkg --print-architecture | sed 's/amd64/x86_64/; s/arm64/aarch64/')-linux-gnu
export LD_LIBRARY_PATH=$lib:$lib/slurm-wlm SLURM_CONF=$dir/etc/slurm.conf
(umask 077 && head -c 1024 /dev/urandom >etc/munge.key)
host=$(hostname -s)
cat >"$SLURM_CONF" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
CredType=cred/munge
PluginDir=$lib/slurm-wlm
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/ctld.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/log/ctld
SlurmdLogFile=$dir/log/%n
SlurmctldPort=26817
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=30
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[26821-26822] CPUs=2 RealMemory=2000
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
CONF
usr/sbin/munged --force --socket="$dir/run/munge.sock" --key-file="$dir/etc/munge.key" --pid-file="$dir/run/munged.pid" \
  --log-file="$dir/log/munged" --seed-file="$dir/run/seed" || unavailable "munged does not start"
usr/sbin/slurmctld-wlm -c || unavailable "slurmctld does not start; see $dir/log/ctld"
for node in n1 n2; do
  usr/sbin/slurmd-wlm -N "$node" -d "$dir/usr/sbin/slurmstepd-wlm" || unavailable "slurmd does not start; see $dir/log/$node"
done
cat >"$dir/env" <<ENV
export LD_LIBRARY_PATH=$LD_LIBRARY_PATH SLURM_CONF=$SLURM_CONF PATH=$dir/usr/bin:\$PATH
export JAX_COORDINATOR_ADDRESS=127.0.0.1:26830
ENV
# shellcheck source=/dev/null
. "$dir/env"
for ((k = 0; k < 60; k++)); do
  [[ $(sinfo -h -t idle -o %D 2>/dev/null) == 2 ]] && exit 0
  sleep 1
done
unavailable "its nodes do not come up: $(sinfo -h 2>&1 | tail -n 1)"
