#!/bin/bash
# shellcheck disable=SC2086 # lists of options are to be split where they have spaces
# All systems at five million parameters each, on one dataset, for one time, measured alike: docs/results.md.
#
#   bash runs/shootout.sh                               a CPU: 20 minutes a system, and as long again to measure
#   DEVICE=cuda MINUTES=10 bash runs/shootout.sh        a GPU
#   MINUTES=60 OUT=runs/shootout-hour bash runs/shootout.sh
#
# Run the same command again and it goes on where it stopped.
#
# Time: a budget each for the tokenizer and five systems. CPU time is counted, not time on the clock, so that a busy
# machine takes longer and gives the same. On two cores of a Zen 4 recording takes 3 minutes, codes 10, the network that
# reads actions 3, and measuring a system 10 to 15, with OPTIONS="--stages=2 --long-clips=8", most of it rollouts of 264
# frames, in bfloat16 where that is faster. Disk: 2 GB. Memory: 8 GB.
source "$(dirname "$0")/common.sh"

# Of all processes: those that wait for each other sleep, or the CPU time that is counted depends on other work.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

DATA=${DATA:-data/shootout}       # train and val come below it
OUT=${OUT:-runs/shootout}         # networks and results come below it
CLIPS=${CLIPS:-512}               # to train on; each is a walk of a person through a maze of its own
VAL_CLIPS=${VAL_CLIPS:-64}        # to measure against, in other mazes
DATA_SEED=${DATA_SEED:-0}         # of mazes, textures and walks
MINUTES=${MINUTES:-20}            # of each system
BUDGET_SECONDS=${BUDGET_SECONDS-} # the same in seconds, for a trial
DEVICE=${DEVICE:-cpu}
OPTIONS=${OPTIONS-}               # more options of runs.shootout, such as "--clips=256 --stages=8"
PAGE=${PAGE:-docs/results.md}
FIGURES=${FIGURES:-docs/results}

say "Weights of the detectors that measure"
run python -m metrics.detectors.registry fetch

for split in train val; do
    clips=$CLIPS
    [ $split = train ] || clips=$VAL_CLIPS
    say "Record $clips clips of 300 frames for the $split split"
    once "$DATA/.done/$split" python -m dataset_tools.make_dataset_from_vizdoom "$DATA/$split" --split="$split" \
        --clips="$clips" --frames=300 --sizes=48x64 --walker=person --textures=soft --seed="$DATA_SEED"
done

say "Train and measure"
run python -m runs.shootout --train="$DATA/train" --val="$DATA/val" --out="$OUT" --minutes="$MINUTES" \
    ${BUDGET_SECONDS:+--budget-seconds="$BUDGET_SECONDS"} --device="$DEVICE" $OPTIONS

say "Write the page"
run python -m runs.shootout_report "$OUT/results.jsonl" --page="$PAGE" --figures="$FIGURES"
