#!/bin/bash
# Make a dataset by a Slurm job array, each of whose tasks makes one partition. From the root of the repository:
#
#   sbatch dataset_tools/make_dataset_sbatch.sh make_dataset_from_videos INPUT_DIR OUTPUT_DIR [OPTIONS]
#   sbatch --array=0-31 dataset_tools/make_dataset_sbatch.sh make_dataset_from_frames INPUT_DIR OUTPUT_DIR --fps 25
#
# There are as many partitions as tasks, of which --array=0-31%4 runs only 4 at a time. When all are done, check that
# nothing is missing:
#
#   python -m dataset_tools.merge OUTPUT_DIR
#
# To make some partitions again, say how many there are in all:
#
#   NUM_PARTITIONS=32 sbatch --array=5,17 dataset_tools/make_dataset_sbatch.sh ...

#SBATCH --job-name=make_dataset
#SBATCH --array=0-9
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=2G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log

set -euo pipefail

fail() {
    echo "$1" >&2
    exit 2
}

[[ $# -ge 1 ]] || fail "say which maker to run, and its arguments: $0 make_dataset_from_videos INPUT_DIR OUTPUT_DIR"
[[ -n ${SLURM_ARRAY_TASK_ID-} ]] || fail "this is a task of a Slurm job array: start it by sbatch, not by itself"
maker=$1
shift

# Slurm runs a copy of this file that lies elsewhere.
cd "$SLURM_SUBMIT_DIR"
[[ -f dataset_tools/$maker.py ]] ||
    fail "there is no dataset_tools/$maker.py in $SLURM_SUBMIT_DIR: run sbatch from the root of the repository"

if [[ -z ${NUM_PARTITIONS-} && $SLURM_ARRAY_TASK_MAX -ge $SLURM_ARRAY_TASK_COUNT ]]; then
    fail "--array does not count from 0 without gaps: say how many partitions there are by NUM_PARTITIONS=..."
fi

exec python -m "dataset_tools.$maker" "$@" \
    --partition "$SLURM_ARRAY_TASK_ID" --num-partitions "${NUM_PARTITIONS:-$SLURM_ARRAY_TASK_COUNT}"
