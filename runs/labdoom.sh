#!/bin/bash
# shellcheck disable=SC2046,SC2086 # lists of options are to be split where they have spaces
# From nothing to a trained pair: record first-person walks through mazes, train both stages, generate, measure.
#
#   bash runs/labdoom.sh                                 one GPU
#   NPROC=4 bash runs/labdoom.sh                         four GPUs of one machine
#   PRESET=toy CLIPS=64 VAL_CLIPS=16 METRICS=fvd64_16f bash runs/labdoom.sh      a CPU, half an hour
#   PRESET=labdoom-tiny DIFFICULTY=easy LOOKS=1 TEXTURES=soft DATA_SEED=12 CLIPS=400 VAL_CLIPS=64 METRICS=fvd128_16f \
#       LRES_LAST_STEPS=500 LRES_LAST_OPTIONS="--g-lr=0.001 --d-lr=0.0003" bash runs/labdoom.sh
#                                                        a CPU, an hour and a half: the pair in models/
#
# Run the same command again and everything goes on where it stopped. With a larger LRES_STEPS training goes on further.
#
# Time: the pair in models/ took an hour of one core of a server, and beside it 24 minutes of another. The default 2256
# clips take 70 minutes of one core to record, so 9 of eight cores; training on them has not been timed on a GPU: its
# first status lines tell (`eta`).
# Disk: 35 GB for the footage at 36x64 and 144x256, 2.2 GB for that of the pair in models/, 1 GB for the runs.
# Memory: 4 GB, and 0.2 GB for each core that records. GPU: 12 GB.
source "$(dirname "$0")/common.sh"

PRESET=${PRESET:-labdoom-small}  # a row of training/longvideogan/presets.py, in both stages
LRES_SIZE=${LRES_SIZE:-$(value_of train_lres.py "$PRESET" '"{height}x{width}".format(**m)')}
SRES_SIZE=${SRES_SIZE:-$(value_of train_sres.py "$PRESET" '"{height}x{width}".format(**m)')}
DATA=${DATA:-data/labdoom}       # train and val come below it
OUT=${OUT:-runs/labdoom}         # run directories, videos and numbers come below it
CLIPS=${CLIPS:-2000}             # to train on; each is a walk through a maze of its own
VAL_CLIPS=${VAL_CLIPS:-256}      # to measure against, in other mazes
FRAMES=${FRAMES:-300}            # of each clip, at 30 a second
DIFFICULTY=${DIFFICULTY:-normal} # easy, normal, hard, mixed
LOOKS=${LOOKS-}                  # so many sets of textures and colours; empty: each maze its own
TEXTURES=${TEXTURES:-full}       # full; soft and flat have less detail, for small models
DATA_SEED=${DATA_SEED:-0}        # of mazes, textures, colours and walks
LRES_STEPS=${LRES_STEPS-}        # empty: as many as the preset says
SRES_STEPS=${SRES_STEPS-}
LRES_OPTIONS=${LRES_OPTIONS-}    # more options of train_lres.py, such as "--batch=8 --metric=fvd256_16f"
LRES_LAST_STEPS=${LRES_LAST_STEPS-}     # after these so many more, in a run of their own,
LRES_LAST_OPTIONS=${LRES_LAST_OPTIONS-} # with other options, such as lower rates
SRES_OPTIONS=${SRES_OPTIONS-}    # more options of train_sres.py
SEEDS=${SEEDS:-0-3}              # of the videos
LEN=${LEN:-900}                  # their frames
METRICS=${METRICS:-fvd2048_16f fmd2048_16f}
NPROC=${NPROC:-1}                # processes that train and measure, one for each GPU
THREADS=${THREADS-}              # of each process; empty: one for each core

check_sizes "$PRESET" "$LRES_SIZE" "$SRES_SIZE"
say "Weights of the detectors that measure"
run python -m metrics.detectors.registry fetch

for split in train val; do
    clips=$CLIPS
    [ $split = train ] || clips=$VAL_CLIPS
    say "Record $clips clips for the $split split"
    once "$DATA/.done/$split" python -m dataset_tools.make_dataset_from_vizdoom "$DATA/$split" --split="$split" \
        --clips="$clips" --frames="$FRAMES" --sizes="$LRES_SIZE,$SRES_SIZE" --difficulty="$DIFFICULTY" \
        --seed="$DATA_SEED" --textures="$TEXTURES" ${LOOKS:+--looks="$LOOKS"}
done

say "Train the low-resolution stage"
ranks run train_lres.py --outdir="$OUT/lres" --dataset="$DATA/train" --preset="$PRESET" --size="$LRES_SIZE" \
    ${LRES_STEPS:+--steps="$LRES_STEPS"} $LRES_OPTIONS
LRES=$(network_of "$OUT/lres")
if [ -n "$LRES_LAST_STEPS" ]; then
    say "Train it further, with other options"
    ranks run train_lres.py --outdir="$OUT/lres-last" --dataset="$DATA/train" --preset="$PRESET" --size="$LRES_SIZE" \
        --init-from="${LRES%-G-ema.pkl}-train.pt" --steps="$LRES_LAST_STEPS" $LRES_OPTIONS $LRES_LAST_OPTIONS
    LRES=$(network_of "$OUT/lres-last")
fi

say "Train the super-resolution stage"
ranks run train_sres.py --outdir="$OUT/sres" --dataset="$DATA/train" --preset="$PRESET" --size="$SRES_SIZE" \
    --lres-size="$LRES_SIZE" ${SRES_STEPS:+--steps="$SRES_STEPS"} $SRES_OPTIONS
SRES=$(network_of "$OUT/sres")

say "Generate"
once "$OUT/.done/videos" python generate.py --outdir="$OUT/videos" --seeds="$SEEDS" --len="$LEN" --save-lres=True \
    --lres="$LRES" --sres="$SRES"

say "Measure the pair against mazes it has not seen"
ranks once "$OUT/.done/metrics" calc_metrics.py --dataset="$DATA/val" --lres="$LRES" --sres="$SRES" \
    $(printf -- '--metric=%s ' $METRICS) --path="$OUT/metrics.jsonl"

say "The videos are in $OUT/videos, the numbers in $OUT/metrics.jsonl"
