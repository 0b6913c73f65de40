#!/bin/bash
# shellcheck disable=SC2046,SC2086 # lists of options are to be split where they have spaces
# From a folder of videos to a trained pair: make a dataset, check it, train both stages, generate, measure.
#
#   bash runs/own_videos.sh my_videos
#   NPROC=8 DATA=data/surf OUT=runs/surf bash runs/own_videos.sh my_videos
#   PRESET=toy METRICS=fvd64_16f bash runs/own_videos.sh my_videos       a CPU: does all of it work on this footage?
#
# Run the same command again and everything goes on where it stopped. Videos added to the folder since become part of the
# dataset, and training continues on it. A dataset that is already at DATA is used if it was made with the same options.
#
# How to choose sizes. They are those of the preset unless you say otherwise: 36x64 and 144x256. Height comes first.
#   SRES_SIZE  Its long edge is a power of two, at least 64; the short edge follows the shape of your footage, which is
#              cropped around its middle: 144x256 for 16:9, 192x256 for 4:3, 256x256 for squares, 256x144 for upright
#              videos. Twice the edge takes about four times the time and memory.
#   LRES_SIZE  Both edges of SRES_SIZE divided by 4, or by another power of two that leaves at least 16 for the long
#              edge. What happens in a video must be visible at this size.
# A size that cannot be is refused with the nearest that can, before anything is made.
#
# Time: an hour of footage becomes a dataset in 7 minutes of one core if the videos are small; large ones take longer to
# decode. Training: see docs/training.md. Disk: 7 GB for an hour of footage at 36x64, 144x256 and 30 frames a second;
# 12 GB for the runs at the published widths. Memory: 8 GB. GPU: not measured at the published widths; where its memory
# is short, give LRES_OPTIONS and SRES_OPTIONS a --grad-accum of 4, 8, ..., which takes less for the same result.
source "$(dirname "$0")/common.sh"

if [ $# -ne 1 ] || [ ! -d "$(from_caller "$1")" ]; then
    echo "Give the folder of your videos: bash runs/own_videos.sh my_videos" >&2
    exit 2
fi
VIDEOS=$(from_caller "$1")
PRESET=${PRESET:-default}        # a row of training/longvideogan/presets.py, in both stages
LRES_SIZE=${LRES_SIZE:-$(value_of train_lres.py "$PRESET" '"{height}x{width}".format(**m)')}
SRES_SIZE=${SRES_SIZE:-$(value_of train_sres.py "$PRESET" '"{height}x{width}".format(**m)')}
NUM_FRAMES=${NUM_FRAMES:-$(value_of train_lres.py "$PRESET" 'm["num_frames"]')}  # of a clip; shorter ones are left out
DATA=$(from_caller "${DATA:-$PWD/data/mine}")
OUT=$(from_caller "${OUT:-$PWD/runs/mine}")  # run directories, videos and numbers are written below it
FPS=${FPS-}                      # of the dataset; frames are dropped or repeated. Empty: that of the videos
VAL_FRACTION=${VAL_FRACTION:-0}  # share of the videos to measure against, not to train on: 0.1 where there are many
PARTITIONS=${PARTITIONS:-10}     # parts in which the dataset is made; an interruption costs the part it was at
DATASET_OPTIONS=${DATASET_OPTIONS---split-shots}  # more options of make_dataset_from_videos; empty for footage without cuts
LRES_STEPS=${LRES_STEPS-}        # empty: as many as the preset says
SRES_STEPS=${SRES_STEPS-}
LRES_OPTIONS=${LRES_OPTIONS-}    # more options of train_lres.py, such as "--grad-accum=4 --x-flip=false"
SRES_OPTIONS=${SRES_OPTIONS-}    # more options of train_sres.py
SEEDS=${SEEDS:-0-3}              # of the videos
LEN=${LEN:-900}                  # their frames
METRICS=${METRICS:-fvd2048_16f fmd2048_16f}
NPROC=${NPROC:-1}                # processes that train and measure, one for each GPU
THREADS=${THREADS-}              # of each process; empty: one for each core

check_sizes "$PRESET" "$LRES_SIZE" "$SRES_SIZE"
say "Weights of the detectors that measure"
run python -m metrics.detectors.registry fetch

say "Make the dataset"
run python -m dataset_tools.make_dataset_from_videos "$VIDEOS" "$DATA" --sizes="$LRES_SIZE,$SRES_SIZE" \
    ${FPS:+--fps="$FPS"} --min-frames="$NUM_FRAMES" --val-fraction="$VAL_FRACTION" --num-partitions="$PARTITIONS" \
    --skip-bad --skip-made $DATASET_OPTIONS
TRAIN=$DATA
VAL=$DATA
if [ "$VAL_FRACTION" != 0 ]; then
    TRAIN=$DATA/train
    VAL=$DATA/val
fi

say "Check it"
run python -m dataset_tools.inspect_dataset "$TRAIN" --num-frames="$NUM_FRAMES" \
    --sheet="$DATA/clips.png"

say "Train the low-resolution stage"
ranks run train_lres.py --outdir="$OUT/lres" --dataset="$TRAIN" --preset="$PRESET" --size="$LRES_SIZE" \
    --num-frames="$NUM_FRAMES" ${LRES_STEPS:+--steps="$LRES_STEPS"} $LRES_OPTIONS
LRES=$(network_of "$OUT/lres")

say "Train the super-resolution stage"
ranks run train_sres.py --outdir="$OUT/sres" --dataset="$TRAIN" --preset="$PRESET" --size="$SRES_SIZE" \
    --lres-size="$LRES_SIZE" ${SRES_STEPS:+--steps="$SRES_STEPS"} $SRES_OPTIONS
SRES=$(network_of "$OUT/sres")

say "Generate"
once "$OUT/.done/videos" python generate.py --outdir="$OUT/videos" --seeds="$SEEDS" --len="$LEN" ${FPS:+--fps="$FPS"} \
    --save-lres=True --lres="$LRES" --sres="$SRES"

say "Measure"
ranks once "$OUT/.done/metrics" calc_metrics.py --dataset="$VAL" --lres="$LRES" --sres="$SRES" \
    $(printf -- '--metric=%s ' $METRICS) --path="$OUT/metrics.jsonl"

say "The videos are in $OUT/videos, the numbers in $OUT/metrics.jsonl"
