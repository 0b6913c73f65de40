#!/bin/bash
# torchrun reads options that stand behind the script's name, if they are abbreviations of its own.
#
# Package: torch 2.13.0.
# Behaviour: all words behind the name of the script are the script's own, says the usage line. But the parser looks for
# abbreviations of torchrun's options in all words first: an option of the script that begins several of them, such as
# --log (of --log-dir, --logs-specs and others) ends the launch as ambiguous before the script is run. An option that begins
# one or none, and one spelt as torchrun spells it, reach the script.
# Output seen: ambiguous option: --log=wandb could match --log-dir, --log_dir, --logs-specs, --logs_specs; then
# the script gets ['--logger=wandb', '--nnodes=x'].
# Exit status: 0 if the behaviour is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
echo 'import sys; print("the script gets", sys.argv[1:])' > "$folder/script.py"
run() {
    "$folder/env/bin/torchrun" --standalone --nproc_per_node=1 "$folder/script.py" "$@" 2>&1 || true
}
refused=$(run --log=wandb)
taken=$(run --logger=wandb --nnodes=x)
grep -o "ambiguous option: .*" <<< "$refused"
grep "the script gets" <<< "$taken"
grep -q "ambiguous option: --log" <<< "$refused"
! grep -q "the script gets" <<< "$refused"
grep -q "the script gets \['--logger=wandb', '--nnodes=x'\]" <<< "$taken"
