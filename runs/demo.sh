#!/bin/bash
# The whole workflow on a CPU: record footage, train a tokenizer and a world model, continue held-out clips, measure.
#
#   bash runs/demo.sh                      what `make demo` does
#   bash runs/demo.sh --world-steps=2400   options of runs/demo.py
#
# Time: about 6 minutes on two cores with bfloat16, 8 without. Disk: 0.5 GB below outputs/demo, and 0.1 GB of detector
# weights in ~/.cache/dnnlib. Memory: 2 GB. Stopped in between, it goes on when it is started again.
#
# Minutes of training give blurred corridors that fade within seconds. More steps help, as does a larger dataset.
source "$(dirname "$0")/common.sh"

run python -m metrics.detectors.registry fetch i3d-kinetics-400
run python -m runs.demo "$@"
