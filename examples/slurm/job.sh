#!/bin/bash
# One job that goes on until the run is complete: Slurm stops it at a checkpoint before its time limit, and it comes again.
#
#   sbatch examples/slurm/job.sh q.zarr k.zarr v.zarr out.zarr --causal
#
# Slurm sends SIGTERM two minutes before the limit. cqsa then stops at its next checkpoint and ends with exit code 3,
# "stopped, resumable", and the job puts itself back into the queue. Any other code ends it: 0 is done.
#
# Add what your cluster wants: a partition, processors and memory, and a line that activates your environment.
#
#SBATCH --job-name=cqsa
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u

cqsa run "$@" &
worker=$!
trap 'kill -TERM "$worker" 2>/dev/null' TERM
wait "$worker"
code=$?
while kill -0 "$worker" 2>/dev/null; do # a signal ended the waiting, not the run
    wait "$worker"
    code=$?
done

if [ "$code" -eq 3 ]; then # stopped before the end, resumable: come again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
