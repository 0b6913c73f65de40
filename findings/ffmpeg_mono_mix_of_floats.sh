#!/bin/bash
# ffmpeg mixes stereo to mono 1.41 times louder if the samples are floating-point numbers.
#
# Package: imageio-ffmpeg 0.8.1, which holds ffmpeg 9.0.2.
# Behaviour: "-ac 1" mixes two equal channels of level 0.5 to 0.5 if the output is s16, and to 0.7071 if it is f32 or f64. The
# weights of the mix are 0.7071 each, and only for whole numbers, which cannot exceed full scale, are they divided by
# their sum. The same command with another sample format thus gives another level, and loud tracks exceed 1. The option
# rematrix_maxval=1 of the filter aresample divides them for all formats.
# Output seen: s16le 0.5, f32le 0.7071, f64le 0.7071, f32le with rematrix_maxval=1 0.5
# Exit status: 0 if the behaviour is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet imageio-ffmpeg==0.8.1 numpy
"$folder/env/bin/python" - <<'PY'
import subprocess
import sys

import imageio_ffmpeg
import numpy as np

SOURCE = ["-f", "lavfi", "-i", "aevalsrc='0.5|0.5':d=0.01:s=16000,aformat=sample_fmts=s16"]
TYPES = {"s16le": ("<i2", 1 / 32768), "f32le": ("<f4", 1), "f64le": ("<f8", 1)}


def level(kind, *mix):
    """Return the level of a mono mix of two channels of level 0.5."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", "error", *SOURCE, *mix, "-f", kind, "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    dtype, scale = TYPES[kind]
    return round(float(np.frombuffer(data, dtype)[50]) * scale, 4)


found = {kind: level(kind, "-ac", "1") for kind in TYPES}
found["f32le with rematrix_maxval=1"] = level("f32le", "-af", "aresample=ochl=mono:rematrix_maxval=1")
print(", ".join(f"{name} {value:g}" for name, value in found.items()))
sys.exit(0 if [round(value, 2) for value in found.values()] == [0.5, 0.71, 0.71, 0.5] else 1)
PY
