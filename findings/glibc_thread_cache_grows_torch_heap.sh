#!/bin/bash
# With glibc's cache of small blocks, PyTorch on a CPU needs more memory in each of many equal steps; without it, never.
#
# Packages: torch 2.13.0 (CPU wheel); glibc 2.36 (Debian 12), Linux on x86-64; one thread.
# Behaviour: a loop computes the same convolutions of the same shapes, and keeps the small results of its last seven steps. Its
# peak of resident memory still grows for hundreds of steps, to almost twice the memory of the step, though nothing leaks. Each
# tensor comes from posix_memalign, which frees a fragment at its edge. glibc puts up to seven of each small size
# into a cache of the thread (malloc's "tcache"), where a block is not joined with the free memory beside it, so that the tensor's
# place is then a little too small for a tensor of the same size, and the heap gets longer. glibc.malloc.tcache_count=0 turns the
# cache off: the peak is that of the first steps. Which step grows differs from run to run with the addresses of the process.
# Output seen: with the cache: 219 283 297; without it: 219 261 261 (MiB before, after 20 steps, after 400)
# Again, twice: the same
# Exit status: 0 if the peak grows by 8 MiB or more with the cache and by at most 1 MiB without it, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/steps.py" <<'PY'
import ctypes
import re

import torch

torch.manual_seed(0)
torch.set_num_threads(1)
# Freed memory stays in the process, as with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of the largest value.
libc = ctypes.CDLL(None)
libc.mallopt(-3, 2**31 - 1)
libc.mallopt(-1, -1)


def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) / 1024


before = peak()
image = torch.randn(4, 32, 72, 128)
weights = [torch.randn(32, 32, 3, 3) for _ in range(6)]
results = []
with torch.no_grad():
    for step in range(400):
        x = image
        for weight in weights:
            x = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(x, weight, padding=1), 0.2)
            x = x / x.square().mean().sqrt()
        results = [*results, x[:, :, ::8, ::8].clone()][-7:]
        del x
        if step == 20:
            early = peak()
print(f"{before:.0f} {early:.0f} {peak():.0f}")
PY
cached=$("$folder/env/bin/python" "$folder/steps.py")
bare=$(GLIBC_TUNABLES=glibc.malloc.tcache_count=0 "$folder/env/bin/python" "$folder/steps.py")
echo "with the cache: $cached; without it: $bare (MiB before, after 20 steps, after 400)"
read -r _ early late <<<"$cached"
read -r _ early_bare late_bare <<<"$bare"
[ $((late - early)) -ge 8 ] && [ $((late_bare - early_bare)) -le 1 ]
