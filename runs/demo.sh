#!/bin/bash
# The whole workflow on a CPU: record footage, train a tokenizer and a world model, continue held-out clips, measure.
#
#   bash runs/demo.sh                      what `make demo` does
#   bash runs/demo.sh --world-steps=2400   options of runs/demo.py
#
# Time: about 7 minutes on two cores. Disk: 0.3 GB below outputs/demo, and 0.1 GB of detector weights in
# ~/.cache/dnnlib. Memory: 2 GB. Stopped in between, it goes on when it is started again.
#
# The networks are far too small to be good. For those that are not, see runs/labdoom.sh and runs/own_videos.sh.
source "$(dirname "$0")/common.sh"

run python -m metrics.detectors.registry fetch i3d-kinetics-400
run python -m runs.demo "$@"
