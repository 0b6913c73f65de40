#!/bin/bash
# oneDNN's linear layer is about a thousand times slower for a weight that is a part of a wider matrix.
#
# Package: torch 2.13.0 (CPU wheel, oneDNN), Linux on x86-64; seen on a processor of AMD with AVX-512, one thread.
# Behaviour: mkldnn._linear_pointwise, the operator of fused linear layers, takes any weight
# (out, in), also one that is not packed. If its rows lie apart in memory, as those of columns cut out of a wider matrix do, or of
# some frames of a clip, the result is the same up to rounding and nothing is printed, but it is computed by code without vector
# instructions. A transposed weight without gaps, and an input with gaps, are as fast as others. torch.nn.functional.linear
# does not slow down for the same weight.
# Output seen: whole 0.63 ms, transposed 0.64 ms, part of a wider matrix 1711.87 ms, its copy 0.62 ms, F.linear 0.68 ms
# Again: 0.64, 0.62, 1723.68, 0.64, 0.66 (beside other work on the same core)
# Exit status: 0 if a part takes at least thirty times as long as its copy, 1 if that has changed.
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
torch.set_num_threads(1)
x, wider = torch.randn(256, 512), torch.randn(256, 600)
part = wider[:, :512]
weights = {
    "whole": torch.randn(256, 512),
    "transposed": torch.randn(512, 256).t(),
    "part of a wider matrix": part,
    "its copy": part.contiguous(),
}


def onednn(weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def milliseconds(product, weight):
    torch.testing.assert_close(product(weight), x @ weight.t(), rtol=1e-4, atol=1e-3)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product(weight)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


with torch.no_grad():
    found = {name: milliseconds(onednn, weight) for name, weight in weights.items()}
    linear = milliseconds(lambda weight: torch.nn.functional.linear(x, weight), part)
print(", ".join(f"{name} {time:.2f} ms" for name, time in found.items()) + f", F.linear {linear:.2f} ms")
sys.exit(not (found["part of a wider matrix"] >= 30 * found["its copy"] and linear < 10 * found["its copy"]))
PY
