#!/bin/bash
# What the recipes share. They source this file; it does nothing by itself.
#
# Each step of a recipe is a command of this project, printed before it runs, so that it can also be typed by hand.
set -euo pipefail
CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi
if [ -n "${THREADS-}" ]; then
    export OMP_NUM_THREADS=$THREADS
fi
# A script that is interrupted saves what it has; the recipe ends, too, whatever its status.
trap 'exit 130' INT

# from_caller PATH: a path given by the user, who may have called the recipe from another folder than this repository.
from_caller() {
    case $1 in
        /*) printf '%s' "$1" ;;
        *) printf '%s/%s' "$CALLED_FROM" "$1" ;;
    esac
}

# say TEXT: a title between the output of two steps.
say() {
    printf '\n== %s\n' "$*"
}

# run COMMAND...: print the command, then run it. The recipe ends where one fails.
run() {
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

# once STAMP COMMAND...: run the command, unless this very one has succeeded before. STAMP is the file that remembers.
once() {
    local stamp=$1 command
    shift
    command=$(printf '%q ' "$@")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$command" ]; then
        echo "Done before (delete $stamp to do it again): $command"
        return
    fi
    run "$@"
    mkdir -p "$(dirname "$stamp")"
    printf '%s' "$command" > "$stamp"
}

# ranks COMMAND... SCRIPT OPTIONS...: put before SCRIPT what runs it in NPROC processes, one for each GPU.
ranks() {
    local words=()
    while [[ $1 != *.py ]]; do
        words+=("$1")
        shift
    done
    if [ "${NPROC:-1}" -gt 1 ]; then
        "${words[@]}" torchrun --standalone --nproc_per_node="$NPROC" "$@"
    else
        "${words[@]}" python "$@"
    fi
}

# value_of SCRIPT PRESET PYTHON: a value of a preset, such as m["height"], where m are the options of its networks.
value_of() {
    local options
    options=$(python "$1" --dataset=none --preset="$2" --dry-run) || return
    python -c "import json, sys; m = json.loads(sys.argv[1])['model']; print($3)" "$options"
}

# check_sizes PRESET LRES_SIZE SRES_SIZE: refuse frame sizes that the networks cannot have, naming some that they can.
check_sizes() {
    python - "$@" <<'PY'
import sys, torch
from training.longvideogan import presets
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator

preset, *sizes = sys.argv[1:]
low, high = (tuple(int(edge) for edge in size.split("x")) for size in sizes)
try:
    with torch.device("meta"):  # nothing is computed, so this takes no time
        SuperResGenerator(*high, *low, **presets.SRES[preset]["model"].get("generator", {}))
        LowResGenerator(*low, **presets.LRES[preset]["model"].get("generator", {}))
except ValueError as error:
    sys.exit(f"Error: {error}")
PY
}

# network_of OUTDIR: of the run below OUTDIR that was trained last, the best network by its first metric, if it measured
# any while it trained, else the last. A run that has not come to its end is an error.
network_of() {
    python - "$1" <<'PY'
import pathlib, sys
from training.side_files import read_object

path = max(pathlib.Path(sys.argv[1]).glob("*/options.json"), key=lambda path: path.stat().st_mtime)
run_dir, steps = path.parent, read_object(path).get("steps")
if not isinstance(steps, int):
    sys.exit(f"Error: {path} is damaged; run the same command again, which writes it anew.")
last = run_dir / f"checkpoints/ckpt-{steps:08d}-G-ema.pkl"
if not last.is_file():
    sys.exit(f"Error: {run_dir} has not come to step {steps} yet; run the same command again to go on.")
best = run_dir / str(read_object(run_dir / "best.json").get("checkpoint"))
print(best if best.is_file() else last)
PY
}
