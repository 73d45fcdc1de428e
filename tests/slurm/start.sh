#!/usr/bin/env bash
# Start a SLURM cluster of one node with 2 CPUs on this machine, for the tests of
# `tables.py --launcher slurm`.
#
#     apt-get install slurm-wlm munge
#     tests/slurm/start.sh DIR        # all files of the cluster are in DIR
#     export SLURM_CONF=DIR/slurm.conf
#     tests/slurm/stop.sh DIR
#
# The SLURM configuration of the machine is neither read nor changed: key, sockets, ports and pid
# files are separate, and only the user who starts the cluster can use it. Partitions: `main` and
# `urgent`; a job of `urgent` preempts jobs of `main`, which are queued again.
set -euo pipefail
mkdir -p "$1"
dir=$(cd "$1" && pwd)
PATH=$PATH:/usr/sbin:/sbin
for command in munged slurmctld slurmd sbatch squeue scontrol; do
    if ! command -v "$command" > /dev/null; then
        echo "command $command not found; run apt-get install slurm-wlm munge"
        exit 3
    fi
done
mkdir -p "$dir/state" "$dir/spool"
chmod 755 "$dir"
host=$(hostname -s)
user=$(id -un)
ports=($(python3 -c "
import socket
found = [socket.socket() for _ in range(2)]
for x in found: x.bind(('127.0.0.1', 0))
print(*(x.getsockname()[1] for x in found))"))

head -c 1024 /dev/urandom > "$dir/munge.key"
chmod 400 "$dir/munge.key"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" \
    2> "$dir/munged.err"

cat > "$dir/slurm.conf" <<CONF
ClusterName=tables
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# cred_expire: a job that is queued again waits this many seconds, until its credentials expire
AuthInfo=socket=$dir/munge.socket,cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF=$dir/slurm.conf
slurmctld
slurmd
for _ in $(seq 100); do
    [ "$(sinfo --noheader --format=%T --partition=main 2> /dev/null)" = idle ] && exit 0
    sleep 0.3
done
echo "the cluster did not start; the last lines of its logs in $dir:"
tail -n 5 "$dir"/*.log
"$(dirname "$0")/stop.sh" "$dir"
exit 1
