#!/bin/bash
# shellcheck disable=SC2046,SC2086 # lists of options are to be split where they have spaces
# The published recipe on the published footage: horseback riding, 36x64 to 144x256, on eight GPUs of one machine.
#
#   bash runs/horseback_8gpu.sh
#   STAGES=lres bash runs/horseback_8gpu.sh              one stage a machine: neither needs the other while it trains
#   NAME=biking bash runs/horseback_8gpu.sh              the other published dataset
#
# Run the same command again and everything goes on where it stopped.
#
# Frames are downloaded from the authors' server in the layout that training reads: horseback under CC BY-NC-SA 4.0,
# biking under CC BY 4.0, which also bind what you make of them. The files are taken to be partition_0000.zip,
# partition_0001.zip, ... up to the first that the server does not have. This has been tried with a server of our own,
# not with theirs. dataset_tools/youtube_configs/README.md tells how to make the dataset from the original videos.
#
# Time: not measured; an estimated five days of eight A100 for the 100,000 steps of the first stage. The first status
# lines tell (`eta`). Disk: about 30 GB for horseback, 40 GB for biking, 12 GB for the two runs. Memory: an estimated
# 4 GB for each of the eight processes. GPU: an estimated 13 to 23 GB; where that is too much, give LRES_OPTIONS a
# --grad-accum of 4 or 8, which takes less for the same result.
source "$(dirname "$0")/common.sh"

NAME=${NAME:-horseback}          # or biking
URL=${URL:-https://nvlabs-fi-cdn.nvidia.com/long-video-gan/datasets/$NAME}
LRES_PRESET=${LRES_PRESET:-$NAME-lres}
SRES_PRESET=${SRES_PRESET:-$NAME-sres}
STAGES=${STAGES:-lres sres}      # lres, sres, or both
DATA=${DATA:-data/$NAME}
OUT=${OUT:-runs/$NAME}           # run directories, videos and numbers come below it
LRES_STEPS=${LRES_STEPS-}        # empty: as published
SRES_STEPS=${SRES_STEPS-}
LRES_OPTIONS=${LRES_OPTIONS:---metric=fvd2048_128f}  # of train_lres.py; the metric decides which network is the best
SRES_OPTIONS=${SRES_OPTIONS:---metric=fvd2048_16f}   # of train_sres.py
SEEDS=${SEEDS:-0-3}              # of the videos
LEN=${LEN:-301}                  # their frames
METRICS=${METRICS:-fvd2048_128f fvd2048_16f}
NPROC=${NPROC:-8}                # processes that train and measure, one for each GPU

# download FOLDER: all partitions of one size, those that are there left out.
download() {
    local file status
    for ((i = 0; ; i++)); do
        file=$1/$(printf 'partition_%04d.zip' "$i")
        if [ -f "$DATA/$file" ]; then
            continue
        fi
        status=$(curl --silent --show-error --location --head --output /dev/null --write-out '%{http_code}' \
            "$URL/$file")
        if [ "$i" -gt 0 ] && { [ "$status" = 404 ] || [ "$status" = 403 ]; }; then
            return
        fi
        mkdir -p "$DATA/$1"
        run curl --fail --location --retry 5 --continue-at - --output "$DATA/$file.part" "$URL/$file"
        mv "$DATA/$file.part" "$DATA/$file"
    done
}

say "Weights of the detectors that measure"
run python -m metrics.detectors.registry fetch

say "Download the dataset"
download "$(value_of train_lres.py "$LRES_PRESET" '"{height:04d}x{width:04d}".format(**m)')"
download "$(value_of train_sres.py "$SRES_PRESET" '"{height:04d}x{width:04d}".format(**m)')"

say "Check it"
once "$DATA/.done/check" python -m dataset_tools.inspect_dataset "$DATA" \
    --num-frames="$(value_of train_lres.py "$LRES_PRESET" 'm["num_frames"]')"

for stage in $STAGES; do
    say "Train the stage $stage"
    if [ "$stage" = lres ]; then
        ranks run train_lres.py --outdir="$OUT/lres" --dataset="$DATA" --preset="$LRES_PRESET" \
            ${LRES_STEPS:+--steps="$LRES_STEPS"} $LRES_OPTIONS
    else
        ranks run train_sres.py --outdir="$OUT/sres" --dataset="$DATA" --preset="$SRES_PRESET" \
            ${SRES_STEPS:+--steps="$SRES_STEPS"} $SRES_OPTIONS
    fi
    network_of "$OUT/$stage"
done
if [ "$STAGES" != "lres sres" ]; then
    say "When the other stage is trained, too, run this without STAGES: it generates and measures"
    exit
fi
LRES=$(network_of "$OUT/lres")
SRES=$(network_of "$OUT/sres")

say "Generate"
once "$OUT/.done/videos" python generate.py --outdir="$OUT/videos" --seeds="$SEEDS" --len="$LEN" --save-lres=True \
    --lres="$LRES" --sres="$SRES"

say "Measure"
ranks once "$OUT/.done/metrics" calc_metrics.py --dataset="$DATA" --lres="$LRES" --sres="$SRES" \
    $(printf -- '--metric=%s ' $METRICS) --path="$OUT/metrics.jsonl"

say "The videos are in $OUT/videos, the numbers in $OUT/metrics.jsonl"
