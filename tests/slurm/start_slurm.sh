#!/usr/bin/env bash
# A real Slurm cluster on one Debian machine: NODES nodes n1..nN, each in its own network namespace.
#
#   start_slurm.sh install   install missing packages with apt-get
#   start_slurm.sh start     start the daemons and wait until all nodes are idle
#   start_slurm.sh clean     end the daemons (by process ID), remove the namespaces, delete SLURM_DIR
#
# Run as root. "SLURM_DIR/enter COMMAND..." runs a command on the cluster. Environment variables:
#   SLURM_DIR   folder for everything: configuration, key, state, logs, process IDs
#   NODES GPUS  number of nodes (2) and of simulated GPUs per node (2; clones of /dev/null)
#   OWNER       process ID; when this process ends, the cluster ends too
set -euo pipefail

D=${SLURM_DIR:?} NODES=${NODES:-2} GPUS=${GPUS:-2}
TAG=slurm$(printf %s "$D" | cksum | cut -c1-6)      # one machine can have several clusters
NET=10.99.7                                         # only within the namespaces
export SLURM_CONF=$D/slurm.conf

die() { echo "start_slurm: $*" >&2; exit 1; }
nodes() { seq -f 'n%.0f' 1 "$NODES"; }
at() {                                              # run a command on "ctl" or a node
  local where=$1; shift
  ip netns exec "$TAG-$where" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$where" "$@"
}
alive() {                                           # does the process in pid file $1 exist, and is it program $2?
  local pid; pid=$(cat "$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] &&
    ! grep -q '^State:.Z' "/proc/$pid/status"
}
finish() {
  alive "$1" "$2" || return 0
  kill "$(cat "$1")"
  for _ in $(seq 80); do alive "$1" "$2" || return 0; sleep 0.1; done
  echo "start_slurm: $2 (pid $(cat "$1")) did not end" >&2
}

install_packages() {
  local want=() pair
  for pair in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client ip:iproute2; do
    command -v "${pair%%:*}" >/dev/null || want+=("${pair#*:}")
  done
  [ ${#want[@]} -eq 0 ] && return
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -q -y --no-install-recommends "${want[@]}"
}

write_config() {
  local k
  for k in $(seq 0 $((GPUS - 1))); do mknod -m 666 "$D/dev/nvidia$k" c 1 3; done
  printf '%s\n' "AutoDetect=off" "NodeName=n[1-$NODES] Name=gpu File=$D/dev/nvidia[0-$((GPUS - 1))]" >"$D/gres.conf"
  echo 'CgroupPlugin=cgroup/v1' >"$D/cgroup.conf"   # else slurmd reads /sys/fs/cgroup and may refuse to start
  {
    cat <<E
ClusterName=onehost
SlurmctldHost=ctl($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job must wait before it may start again (default 120 s)
AuthInfo=socket=$D/munge/socket,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
# plain processes: no cgroups, no binding, no accounting
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
# schedule by the resources that the nodes claim, not by the machine's
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
# short intervals for tests (defaults: 60 s, 30 s, 30 s)
SchedulerParameters=sched_interval=5,bf_interval=5
KillWait=5
# new job IDs: with an old one, submitit would find the result files of an older job
FirstJobId=$(( $(date +%s) % 60000000 + 1 ))
GresTypes=gpu
E
    for k in $(seq "$NODES"); do
      echo "NodeName=n$k NodeAddr=$NET.$((10 + k)) CPUs=64 RealMemory=1000000 Gres=gpu:$GPUS Feature=volta32gb State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
  } >"$D/slurm.conf"
  printf '%s\n' '#!/bin/sh' "export SLURM_CONF=$D/slurm.conf" "exec ip netns exec $TAG-ctl \"\$@\"" >"$D/enter"
  chmod 755 "$D/enter"
}

make_network() {
  local where k
  for where in ctl $(nodes); do
    ip netns add "$TAG-$where"
    ip -n "$TAG-$where" link set lo up
    mkdir -p "/etc/netns/$TAG-$where"               # "ip netns exec" lays this over /etc/hosts
    { echo "127.0.0.1 localhost"; echo "$NET.1 ctl"; for k in $(seq "$NODES"); do echo "$NET.$((10 + k)) n$k"; done; } \
      >"/etc/netns/$TAG-$where/hosts"
  done
  ip -n "$TAG-ctl" link add br0 type bridge
  ip -n "$TAG-ctl" addr add "$NET.1/24" dev br0
  ip -n "$TAG-ctl" link set br0 up
  for k in $(seq "$NODES"); do
    ip -n "$TAG-ctl" link add "v$k" type veth peer name eth0 netns "$TAG-n$k"
    ip -n "$TAG-ctl" link set "v$k" master br0 up
    ip -n "$TAG-n$k" addr add "$NET.$((10 + k))/24" dev eth0
    ip -n "$TAG-n$k" link set eth0 up
  done
}

idle() { [ "$("$D/enter" timeout 5 sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$NODES" ]; }

start() {
  [ ! -e "$D/enter" ] || die "$D is in use"
  mkdir -p "$D"/{state,log,run,munge,dev}; chmod 755 "$D" "$D/munge"; chmod 700 "$D/state"
  local node; for node in $(nodes); do mkdir -p "$D/spool/$node"; done
  write_config
  if [ -n "${OWNER:-}" ]; then
    setsid sh -c 'while kill -0 "$1" && [ -e "$2" ]; do sleep 1; done; [ ! -e "$2" ] || exec "$0" clean' \
      "$0" "$OWNER" "$D/enter" </dev/null >/dev/null 2>&1 &
  fi
  make_network
  ( umask 077; head -c 256 /dev/urandom >"$D/munge/key" )
  munged --socket="$D/munge/socket" --key-file="$D/munge/key" --seed-file="$D/munge/seed" \
    --pid-file="$D/run/munged.pid" --log-file="$D/log/munged.log" --num-threads=2
  at ctl slurmctld
  for node in $(nodes); do at "$node" slurmd -N "$node"; done
  for _ in $(seq 120); do idle && return; sleep 0.25; done
  "$D/enter" timeout 5 sinfo -N -l >&2
  grep -hiE 'fatal|error' "$D"/log/slurm*.log | tail -20 >&2
  die "the nodes are not idle"
}

clean() {
  local node where
  if [ -e "$D/enter" ] && alive "$D/run/slurmctld.pid" slurmctld; then
    "$D/enter" timeout 10 scancel --user=root 2>/dev/null || true      # this cluster's jobs only
    for _ in $(seq 40); do [ -z "$("$D/enter" timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.25; done
  fi
  for node in $(nodes); do finish "$D/run/slurmd-$node.pid" slurmd; done
  finish "$D/run/slurmctld.pid" slurmctld
  finish "$D/run/munged.pid" munged
  for where in $(nodes) ctl; do
    [ -e "/run/netns/$TAG-$where" ] && ip netns del "$TAG-$where"
    rm -rf "/etc/netns/$TAG-$where"
  done
  [ -e "$D/enter" ] && rm -rf "$D"
  return 0
}

case ${1:-} in
  install) install_packages ;;
  start) start ;;
  clean) clean ;;
  *) sed -n '2,12p' "$0"; exit 2 ;;
esac
