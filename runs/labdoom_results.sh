#!/bin/bash
# shellcheck disable=SC2046,SC2086 # lists of options are to be split where they have spaces
# What the pair of runs/labdoom.sh is worth: the numbers and pictures of docs/results.md, from the runs that it left.
#
#   bash runs/labdoom_results.sh
#
# Measured is against mazes that were not trained on: the checkpoints of the low-resolution runs; the best of them with
# the super-resolution stage and with bicubic interpolation; and a shorter run whose temporal filters are short.
# Run the same command again and it goes on where it stopped.
#
# Time: for labdoom-tiny an hour of two cores, a third of which is the run with short filters. Disk: 1 GB.
# Memory: 4 GB.
source "$(dirname "$0")/common.sh"

PRESET=${PRESET:-labdoom-tiny}
DATA=${DATA:-data/labdoom}
OUT=${OUT:-runs/labdoom}               # where runs/labdoom.sh put its runs
EVERY=${EVERY:-500}                    # steps between the checkpoints that are measured
ABLATION_STEPS=${ABLATION_STEPS:-1000} # of the run with short filters; a multiple of EVERY
SHORT_TAPS=${SHORT_TAPS:-16 64}        # its filters, in frames
SIDE=${SIDE:-128}                      # clips of 16 frames to measure on either side
LONG_SIDE=${LONG_SIDE:-32}             # longer clips, and whole videos
LONG_FRAMES=${LONG_FRAMES:-128}        # of longer clips
VIDEO_FRAMES=${VIDEO_FRAMES:-300}      # of whole videos
LRES_OPTIONS=${LRES_OPTIONS-}          # those that runs/labdoom.sh was given
SRES=${SRES:-$(network_of "$OUT/sres")}
SRES_SIZE=$(value_of train_sres.py "$PRESET" '"{height}x{width}".format(**m)')
LRES_SIZE=$(value_of train_lres.py "$PRESET" '"{height}x{width}".format(**m)')
RESULTS=$OUT/results
CLIPS="--dataset=$DATA/val -m fvd${SIDE}_16f -m kvd${SIDE}_16f -m fmd${SIDE}_16f"
VIDEOS="-m color_similarity --num-videos=$LONG_SIDE --num-frames=$VIDEO_FRAMES"

say "Weights of the detectors that measure"
run python -m metrics.detectors.registry fetch

say "Low-resolution networks, checkpoint after checkpoint"
CURVES=()
for name in lres lres-last; do
    if [ -d "$OUT/$name" ]; then
        run python -m runs.curve $(ls -td "$OUT/$name"/*/ | head -n 1) --every="$EVERY" $CLIPS $VIDEOS \
            --out="$RESULTS/$name.jsonl"
        CURVES+=("$RESULTS/$name.jsonl")
    fi
done
LRES=$(
    python - "fvd${SIDE}_16f" "${CURVES[@]}" <<'PY'
import pathlib, sys
from runs.curve import best

print(best(sys.argv[1], *map(pathlib.Path, sys.argv[2:])))
PY
)

say "Full size: the second stage against bicubic interpolation"
for way in "sres=$SRES" "bicubic=$SRES_SIZE"; do
    run python -m runs.curve "$LRES" "--$way" $CLIPS -m fvd${LONG_SIDE}_${LONG_FRAMES}f --out="$RESULTS/${way%%=*}.jsonl"
done

say "Long temporal filters against short ones"
run python train_lres.py --outdir="$OUT/short-filters" --dataset="$DATA/train" --preset="$PRESET" \
    --size="$LRES_SIZE" --filter-taps $SHORT_TAPS --steps="$ABLATION_STEPS" $LRES_OPTIONS
run python -m runs.curve "$OUT"/short-filters/*/ --every="$EVERY" $CLIPS $VIDEOS --out="$RESULTS/short-filters.jsonl"

say "Draw"
run python -m metrics.report "${CURVES[@]}" --out="$RESULTS/curve.png"
run python -m metrics.report "$RESULTS/sres.jsonl" "$RESULTS/bicubic.jsonl" --out="$RESULTS/full-size.png"
# Only what was measured at the same step.
for name in lres short-filters; do
    grep "\"step\": $ABLATION_STEPS," "$RESULTS/$name.jsonl" > "$RESULTS/$name-$ABLATION_STEPS.jsonl"
done
run python -m metrics.report "$RESULTS"/{lres,short-filters}-"$ABLATION_STEPS.jsonl" --out="$RESULTS/filters.png"
say "The pictures and numbers are in $RESULTS"
