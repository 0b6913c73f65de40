#!/bin/bash
# A convolution weight that was packed under another number of threads is tens of times slower for some shapes.
#
# Package: torch 2.13.0 (CPU wheel, oneDNN), Linux on x86-64, at least two cores; seen on a processor with AVX2 without AVX-512.
# Behaviour: aten.mkldnn_reorder_conv2d_weight with the size of the input packs a weight as oneDNN would choose for it, so that
# mkldnn._convolution_pointwise needs no packing in each call (torch.compile with freezing does the same). The layout chosen
# depends on the number of threads at that moment. After torch.set_num_threads has changed it, the result is the same up to
# rounding and nothing is printed, but the weight is converted again in every call by a slow path. Not all shapes are
# affected: 128 to 128 channels at 6x8 and 96 to 128 at 12x16 are, 192 to 384 at 6x8 and 96 to 96 at 12x16 are not.
# Output seen: 1 thread(s): packed under 1 0.20 ms, under 2 10.05 ms; 2 thread(s): packed under 2 0.20 ms, under 1 5.60 ms
# Again: 0.25, 11.20; 0.20, 8.12
# Exit status: 0 if a weight of the other number of threads takes at least five times as long, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PY'
import statistics
import sys
import time

import torch

torch.manual_seed(0)
weight, bias, x = torch.randn(128, 128, 3, 3), torch.randn(128), torch.randn(1, 128, 6, 8)
how = [1, 1], [1, 1], [1, 1], 1  # padding, stride, dilation, groups


def pack(threads):
    torch.set_num_threads(threads)
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *how, list(x.shape))


def convolve(packed):
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *how, "none", [], "")


def milliseconds(packed):
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        convolve(packed)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


with torch.no_grad():
    packed = {threads: pack(threads) for threads in (1, 2)}
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    words, slower = [], []
    for threads, other in ((1, 2), (2, 1)):
        torch.set_num_threads(threads)
        for one in packed.values():
            torch.testing.assert_close(convolve(one), expected, rtol=1e-4, atol=1e-3)
        own, foreign = milliseconds(packed[threads]), milliseconds(packed[other])
        words.append(f"{threads} thread(s): packed under {threads} {own:.2f} ms, under {other} {foreign:.2f} ms")
        slower.append(foreign / own)
print("; ".join(words))
sys.exit(not min(slower) >= 5)
PY
