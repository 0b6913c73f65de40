#!/bin/bash
# shellcheck disable=SC2046,SC2086 # lists of options are to be split where they have spaces
# What the pair of runs/labdoom.sh is worth: the numbers and pictures of docs/results.md, from the runs that it left.
#
#   PRESET=labdoom-tiny DIFFICULTY=easy LOOKS=2 CLIPS=400 VAL_CLIPS=64 bash runs/labdoom.sh
#   bash runs/labdoom_results.sh
#
# Measured is against mazes that were not trained on: the checkpoints of the low-resolution run; the best of them with
# the super-resolution stage and with bicubic interpolation; and a shorter run whose temporal filters are short.
# Run the same command again and it goes on where it stopped.
#
# Time: for labdoom-tiny two hours of two cores, half of which is the run with short filters. Disk: 1 GB.
# Memory: 4 GB.
source "$(dirname "$0")/common.sh"

PRESET=${PRESET:-labdoom-tiny}
DATA=${DATA:-data/labdoom}
OUT=${OUT:-runs/labdoom}               # where runs/labdoom.sh put its runs
LRES_RUN=${LRES_RUN:-$(ls -td "$OUT"/lres/*/ | head -n 1)}
SRES=${SRES:-$(network_of "$OUT/sres")}
EVERY=${EVERY:-1000}                   # steps between the checkpoints that are measured
ABLATION_STEPS=${ABLATION_STEPS:-2000} # of the run with short filters; a multiple of EVERY
SHORT_TAPS=${SHORT_TAPS:-16 64}        # its filters, in frames
SIDE=${SIDE:-128}                      # clips of 16 frames to measure on either side
LONG_SIDE=${LONG_SIDE:-64}             # clips of 128 frames
SRES_SIZE=$(value_of train_sres.py "$PRESET" '"{height}x{width}".format(**m)')
LRES_SIZE=$(value_of train_lres.py "$PRESET" '"{height}x{width}".format(**m)')
RESULTS=$OUT/results
MEASURES="-m fvd${SIDE}_16f -m kvd${SIDE}_16f -m fmd${SIDE}_16f -m color_similarity"

say "Weights of the detectors that measure"
run python -m metrics.detectors.registry fetch

say "Low-resolution network, checkpoint after checkpoint"
run python -m runs.curve "$LRES_RUN" --every="$EVERY" --dataset="$DATA/val" $MEASURES --out="$RESULTS/lres.jsonl"
LRES=$(python -c "import pathlib, sys; from runs import curve; print(curve.best(pathlib.Path(sys.argv[1]), sys.argv[2]))" \
    "$RESULTS/lres.jsonl" "fvd${SIDE}_16f")

say "Full size: the second stage against bicubic interpolation"
for way in "sres=$SRES" "bicubic=$SRES_SIZE"; do
    run python -m runs.curve "$LRES" "--$way" --dataset="$DATA/val" --out="$RESULTS/${way%%=*}.jsonl" \
        -m fvd${SIDE}_16f -m kvd${SIDE}_16f -m fmd${SIDE}_16f -m fvd${LONG_SIDE}_128f
done

say "Long temporal filters against short ones"
run python train_lres.py --outdir="$OUT/short-filters" --dataset="$DATA/train" --preset="$PRESET" \
    --size="$LRES_SIZE" --filter-taps $SHORT_TAPS --steps="$ABLATION_STEPS" --keep=1000 --cache=ram
run python -m runs.curve "$OUT"/short-filters/*/ --every="$EVERY" --dataset="$DATA/val" $MEASURES \
    --out="$RESULTS/short-filters.jsonl"

say "Draw"
run python -m metrics.report "$RESULTS/lres.jsonl" --out="$RESULTS/lres.png"
run python -m metrics.report "$RESULTS/sres.jsonl" "$RESULTS/bicubic.jsonl" --out="$RESULTS/full-size.png"
run python -m metrics.report "$RESULTS/lres.jsonl" "$RESULTS/short-filters.jsonl" --out="$RESULTS/filters.png"
say "The pictures and numbers are in $RESULTS"
