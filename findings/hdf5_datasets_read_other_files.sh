#!/bin/bash
# Reading a dataset of an HDF5 file may return the bytes of any other file, without a sign of it.
#
# Package: h5py 3.16.0 (HDF5 as in its wheel).
# Behaviour: a dataset may be stored in "external" raw files, which it names by absolute or relative paths. h5py.File and
# dataset[...] open and read them without asking; type, shape and values look like those of any dataset. An HDF5 file from
# others can so bring the contents of a private file into what is made of it. dataset.external lists the paths,
# dataset.is_virtual tells of virtual datasets, and get(name, getlink=True) of links to other files. A program that opens
# untrusted HDF5 has to look at all three.
# Output seen: the dataset gives b'a secret', external [('.../secret.txt', 0, 8)], is_virtual False
# Exit status: 0 if the behaviour is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet h5py==3.16.0
printf 'a secret' > "$folder/secret.txt"
mkdir "$folder/elsewhere"
"$folder/env/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import h5py
import numpy as np

folder = Path(sys.argv[1])
path = folder / "elsewhere" / "frames.hdf5"
with h5py.File(path, "w") as file:
    file.create_dataset("frames", (8,), np.uint8, external=[(str(folder / "secret.txt"), 0, 8)])
with h5py.File(path, "r") as file:
    dataset = file["frames"]
    found, external = dataset[...].tobytes(), dataset.external
    shown = [(".../" + Path(name).name, start, size) for name, start, size in external]
    print(f"the dataset gives {found!r}, external {shown}, is_virtual {dataset.is_virtual}")
sys.exit(0 if found == b"a secret" and external else 1)
PY
