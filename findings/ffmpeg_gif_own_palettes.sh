#!/bin/bash
# ffmpeg's GIF encoder compares palette indices, not colours, of consecutive frames.
#
# Package: imageio-ffmpeg 0.8.1, which holds ffmpeg 9.0.2.
# Behaviour: to leave out pixels that have not changed, the encoder compares a frame's indices into its palette with those
# of the frame before, also where every frame has a palette of its own (palettegen=stats_mode=single with
# paletteuse=new=1, which is needed to encode in constant memory). Frames of one grey each, 20, 235 and 20, all have index
# 0 in their own palettes: the third is taken for unchanged, and read back as 235. With -gifflags 0, which turns the
# comparison off, all three are right; turning off either of its two flags alone is not enough.
# Output seen: levels with the default flags: 20 235 235, with -offsetting: 20 235 235, with -transdiff: 20 235 235,
# with 0: 20 235 20
# Exit status: 0 if the behaviour is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet imageio-ffmpeg==0.8.1 numpy
"$folder/env/bin/python" - "$folder/a.gif" <<'PY'
import subprocess
import sys

import imageio_ffmpeg
import numpy as np

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", "error", "-y"]
PALETTES = "split[a][b];[b]palettegen=stats_mode=single[p];[a][p]paletteuse=new=1"
SIZE = 32
frames = np.stack([np.full((SIZE, SIZE, 3), level, np.uint8) for level in (20, 235, 20)])


def levels(flags):
    """Encode the frames with these flags of the encoder, and return the levels that decoding gives."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}", "-r", "10", "-i", "pipe:0"]
    subprocess.run([*FFMPEG, *raw, "-vf", PALETTES, *flags, sys.argv[1]], input=frames.tobytes(), check=True)
    decode = ["-i", sys.argv[1], "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    data = subprocess.run([*FFMPEG, *decode], capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, SIZE * SIZE * 3).mean(1).round().astype(int).tolist()


found = {name: levels(flags) for name, flags in {
    "the default flags": [], "-offsetting": ["-gifflags", "-offsetting"],
    "-transdiff": ["-gifflags", "-transdiff"], "0": ["-gifflags", "0"],
}.items()}
print("levels with " + ", with ".join(f"{name}: {' '.join(map(str, seen))}" for name, seen in found.items()))
wrong, right = [20, 235, 235], [20, 235, 20]
sys.exit(list(found.values()) != [wrong, wrong, wrong, right])
PY
