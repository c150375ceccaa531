#!/usr/bin/env bash
# Install Debian's Slurm for the tests beside a real cluster. Exit status: 0 it is there; 1 it is not, and why is said.
set -euo pipefail

has_all() { command -v slurmctld slurmd munged sbatch >/dev/null; }
give_up() { echo "no Slurm for the integration tests, which skip what needs it: $1" >&2; exit 1; }

has_all && exit 0
command -v apt-get >/dev/null || give_up "it is not installed, and there is no apt-get"
[ "$(id -u)" = 0 ] || give_up "it is not installed, and apt-get needs root"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge; } >"$log" 2>&1 \
  || give_up "apt-get cannot install it ($(tail -n 1 "$log"))"
