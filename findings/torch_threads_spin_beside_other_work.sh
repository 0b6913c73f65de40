#!/bin/bash
# Beside other work on the same cores, the threads of torch's operators on a CPU keep each other from running.
#
# Package: torch 2.13.0 (its CPU wheel brings GNU's OpenMP), Linux, at least two cores.
# Behaviour: two processes that never rest occupy two cores, and a third runs small convolutions with torch on two threads
# on the same cores, where half of its speed alone might be expected. By default it reaches about a fifth, and much less at
# times: a thread that is done waits in a loop of 300,000 turns for the other one, which does not run, as the loop occupies
# its core. With OMP_WAIT_POLICY=PASSIVE in the environment before torch is imported the thread sleeps, and the same
# convolutions reach nearly the half. Nothing is printed, and the waiting counts as CPU time of the process.
# Output seen: convolutions a second: alone 1532; beside other work 334, with OMP_WAIT_POLICY=PASSIVE 861; pairs: 288 902,
# 32 571, 436 995, 372 780, 542 1057. Again: 2101; 402, 933
# Exit status: 0 if sleeping is at least 1.5 times as fast beside other work (means of five pairs), 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/work.py" <<'PY'
import time

import torch

torch.set_num_threads(2)
x, weight = torch.randn(4, 32, 24, 32), torch.randn(32, 32, 3, 3)
with torch.no_grad():
    for seconds in (1, 3):  # the first to warm up
        count, begin = 0, time.monotonic()
        while time.monotonic() < begin + seconds:
            torch.nn.functional.conv2d(x, weight, padding=1)
            count += 1
print(count / 3)
PY
"$folder/env/bin/python" - "$folder/work.py" <<'PY'
import os
import subprocess
import sys

cores = sorted(os.sched_getaffinity(0))[:2]
if len(cores) < 2:
    sys.exit("This needs two cores.")
os.sched_setaffinity(0, cores)
kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}


def measure(**environment):
    done = subprocess.run(
        [sys.executable, sys.argv[1]], env=kept | environment, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


alone = measure()
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
try:
    pairs = [(measure(), measure(OMP_WAIT_POLICY="PASSIVE")) for _ in range(5)]
finally:
    for process in others:
        process.kill()
default, passive = (sum(values) / len(values) for values in zip(*pairs))
print(
    f"convolutions a second: alone {alone:.0f}; beside other work {default:.0f}, with OMP_WAIT_POLICY=PASSIVE "
    f"{passive:.0f}; pairs: {', '.join(f'{a:.0f} {b:.0f}' for a, b in pairs)}"
)
sys.exit(not passive > 1.5 * default)
PY
