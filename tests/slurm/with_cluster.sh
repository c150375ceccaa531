#!/usr/bin/env bash
# usage: with_cluster.sh COMMAND [ARGUMENT ...]
# Run a command beside a Slurm of two virtual nodes on this host; needs root and what install.sh installs.
#
# All of it lives in its own namespaces of processes, network (loopback only), mounts and host name, and dies with the
# command. CLUSTER_PID is the process outside, through which `nsenter` gets in. Exit status: the command's.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CLUSTER_DIR=$(mktemp -d)
export HERE CLUSTER_DIR
trap 'rm -rf "$CLUSTER_DIR"' EXIT

inside() {
  set -euo pipefail
  read -r CLUSTER_PID _ </proc/self/stat # still that of the outer namespace
  mount -t proc proc /proc
  ip link set lo up
  ip addr add 127.0.0.2/8 dev lo # with 127.0.0.1 alone getaddrinfo(AI_ADDRCONFIG) finds nothing
  hostname slurmhost
  { cat /etc/hosts; echo '127.0.0.1 slurmhost node1 node2'; } >"$CLUSTER_DIR/hosts"
  mount --bind "$CLUSTER_DIR/hosts" /etc/hosts
  "$HERE/start.sh" "$CLUSTER_DIR" </dev/null
  export CLUSTER_PID SLURM_CONF="$CLUSTER_DIR/slurm.conf" PATH="$HERE/bin:$PATH" GLOO_SOCKET_IFNAME=lo
  "$@"
}
export -f inside

unshare --net --uts --mount --pid --fork --kill-child bash -c 'inside "$@"' with_cluster "$@"
