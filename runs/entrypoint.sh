#!/bin/bash
# Entry point of the container (runs/Dockerfile): a script of this project, -m and a module, or any other program.
#
#   docker run longtake train_lres.py --dataset=data/mine
#   docker run longtake -m dataset_tools.inspect_dataset data/mine
#   docker run longtake torchrun --standalone --nproc_per_node=8 /longtake/train_lres.py --dataset=data/mine
#
# The process that trains takes this one's place, so that `docker stop` reaches it and it saves what it has.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case "${1-}" in
    "" | -h | --help)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        echo "Scripts, each with --help: $(cd "$home" && echo *.py)"
        ;;
    *.py)
        if [ -f "$1" ] || [ ! -f "$home/$1" ]; then
            exec python "$@"
        fi
        exec python "$home/$1" "${@:2}"
        ;;
    -m)
        exec python "$@"
        ;;
    *)
        exec "$@"
        ;;
esac
