#!/usr/bin/env bash
# Check and measure everything on one GPU that has been verified on a CPU only, within ten minutes.
#
#   benchmarks/gpu.sh                     on a GPU; writes JSON and a log to outputs/gpu
#   DEVICE=cpu benchmarks/gpu.sh          a dry run on a CPU: the same commands, with --quick
#
# In this order, so that what is most in doubt comes first; a step that fails or takes too long does not stop the others:
#   tests         every test that is marked gpu
#   ops           the operators against the reference and against the bandwidth of a copy
#   train_step    training steps of both LongVideoGAN stages against the reference path (bars: 4 and 3 times)
#   networks      forward, backward and R1 passes
#   generate      speed and peak memory of generation
#   compilation   --compile: steps and videos
#   layouts       contiguous against channels-last
#   cuda_graphs   evaluations of RIVER and of the world model, replayed as CUDA graphs and not
# The benchmarks of linear layers, tokenizers and the other systems measure CPUs only; they have no --device.
# Copy the figures into docs/performance.md (benchmarks.all --docs), and correct "Not verified on a GPU" in docs/LOG.md.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/gpu}
mkdir -p "$OUT"
QUICK=()
PATIENCE=1
[ "$DEVICE" = cuda ] || QUICK=(--quick) PATIENCE=10
failed=()

step() {  # name, seconds, command
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name: $*"
    if timeout "$((limit * PATIENCE))" "$@" >"$OUT/$name.log" 2>&1; then
        tail -n 3 "$OUT/$name.log"
        echo "== $name: done in $((SECONDS - start)) s"
    else
        failed+=("$name")
        tail -n 15 "$OUT/$name.log"
        echo "== $name: FAILED after $((SECONDS - start)) s, see $OUT/$name.log"
    fi
}

benchmark() {  # name, seconds, options
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$PYTHON" -m "benchmarks.$name" --json="$OUT/$name.json" "${QUICK[@]}" "$@"
}

if [ "$DEVICE" = cuda ]; then
    nvidia-smi -L || { echo "There is no GPU here: DEVICE=cpu makes a dry run" >&2; exit 1; }
    step tests 120 "$PYTHON" -m pytest -q -m gpu
else
    step tests 120 "$PYTHON" -m pytest -q -m gpu --collect-only
fi
benchmark ops 60 --device="$DEVICE"
benchmark train_step 80 --device="$DEVICE"
benchmark networks 50 --device="$DEVICE"
benchmark generate 40 --device="$DEVICE" --pair --way=stream
benchmark compilation 80 --device="$DEVICE"
benchmark layouts 20 --device="$DEVICE"
benchmark cuda_graphs 30 --device="$DEVICE"

if [ ${#failed[@]} -gt 0 ]; then
    echo "Failed: ${failed[*]}"
    exit 1
fi
echo "All done in $SECONDS s; logs and figures are in $OUT"
