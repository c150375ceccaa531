#!/usr/bin/env bash
# usage: start.sh DIR
# Start the daemons of a Slurm of two virtual nodes, in the namespaces that with_cluster.sh has made; returns when both
# nodes are idle. DIR, an absolute path, gets all files.
set -euo pipefail

DIR=$1
HOST=$(hostname -s)
PORT=16817
CPUS=4 # of a node, whatever the host has
MEMORY=8000 # MB of a node
export SLURM_CONF=$DIR/slurm.conf

mkdir -p "$DIR"/{munge,state,spool/node1,spool/node2,log}
chmod 755 "$DIR"
chmod 711 "$DIR/munge"
chmod 700 "$DIR/log"

# cred_expire: how long a requeued job waits; 5 s is the least that is accepted. PreemptMode: a job of the partition
# `low` gives way to one of `debug`, after SIGTERM and GraceTime seconds. KillWait: seconds from SIGTERM to SIGKILL.
cat >"$SLURM_CONF" <<CONF
ClusterName=tests
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=86400
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
NodeName=node2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
CONF

(umask 077 && dd if=/dev/urandom of="$DIR/munge/key" bs=128 count=1 status=none)
munged --key-file="$DIR/munge/key" --socket="$DIR/munge/munge.sock" --pid-file="$DIR/munge/munged.pid" \
  --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" --num-threads=2
slurmctld -c -f "$SLURM_CONF"
{ sed '/node[12]/d' /etc/hosts; echo '127.0.0.1 node1 node2'; } >"$DIR/hosts_of_nodes"
for node in node1 node2; do # each with its own host name and /etc/hosts
  unshare --uts --mount sh -c "hostname $node; mount --bind '$DIR/hosts_of_nodes' /etc/hosts
    exec slurmd -N $node -f '$SLURM_CONF'"
done

for _ in $(seq 100); do
  idle=$(timeout 2 sinfo --noheader --Node --states=idle --format=%N | sort -u | wc -l) || idle=0
  [ "$idle" = 2 ] && exit 0
  sleep 0.1
done
echo "the nodes of the test's Slurm did not come up; last lines of its logs:" >&2
tail -n 3 "$DIR"/log/*.log >&2
exit 1
