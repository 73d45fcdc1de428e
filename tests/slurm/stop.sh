#!/usr/bin/env bash
# Stop the cluster that start.sh started in a folder, with its jobs.
dir=$(cd "$1" && pwd) || exit 1
export SLURM_CONF=$dir/slurm.conf
timeout 20 scancel --full --signal=KILL --user="$(id -un)" 2> /dev/null
timeout 20 scancel --user="$(id -un)" 2> /dev/null
for daemon in slurmd slurmctld munged; do
    [ -f "$dir/$daemon.pid" ] && kill "$(cat "$dir/$daemon.pid")"
done
exit 0
