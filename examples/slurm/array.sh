#!/bin/bash
# A worker of a run, as a task of a Slurm array. Begin the run, then submit; submit the same line again after any failure:
#
#   cqsa run q.zarr k.zarr v.zarr out.zarr --causal --shares 20 --max-seconds 0
#   sbatch --array=0-4 examples/slurm/array.sh out.zarr.run
#
# Add what your cluster wants: a partition, processors and memory, and a line that activates your environment.
#
#SBATCH --job-name=cqsa
#SBATCH --array=0-4
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u

cqsa work "$1" &
worker=$!
trap 'kill -TERM "$worker" 2>/dev/null' TERM # the end of our time is near: stop at the next safe point
wait "$worker"
code=$?
while kill -0 "$worker" 2>/dev/null; do # a signal ended the waiting, not the worker
    wait "$worker"
    code=$?
done

if [ "$code" -eq 3 ]; then # stopped before the end, resumable: come again
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
