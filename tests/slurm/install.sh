#!/usr/bin/env bash
# Install Slurm and munge for the tests, where this machine lets us; say so and go on where it does not.
set -uo pipefail
PATH=$PATH:/usr/sbin
if type slurmctld slurmd sbatch munged >/dev/null 2>&1; then exit 0; fi # of several, `command -v` wants only one
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Slurm is not installed, and installing it takes root and apt-get: its tests will be skipped" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -q && apt-get install -qy --no-install-recommends slurm-wlm munge; } >/tmp/wmdd-slurm-install.log 2>&1 ||
    echo "Slurm could not be installed (/tmp/wmdd-slurm-install.log): its tests will be skipped" >&2
