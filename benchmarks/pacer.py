"""Run a Python command that reports its CPU time after each unit of work, and then waits for permission to go on.

python pacer.py IN OUT MODULE:FUNCTION SCRIPT|-c ARGUMENTS...

A call of the function begins a unit. OUT gets the CPU seconds of the process so far as a line, then a line from IN is
awaited; both are file descriptors. `benchmarks.compare` runs two checkouts in turns this way. This file imports nothing
of the checkout that it is in, since it is run in others.
"""

import builtins
import functools
import importlib
import os
import runpy
import sys
import time


def main() -> None:
    """Replace the function, and run the command."""
    permissions, reports = (int(number) for number in sys.argv[1:3])
    module, function = sys.argv[3].split(":")

    def pace() -> None:
        os.write(reports, f"{time.process_time()}\n".encode())
        if not os.read(permissions, 1):  # the other end is gone
            sys.exit(1)

    *owners, name = function.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name, None)

    def paced(*arguments, **named):
        pace()
        return original(*arguments, **named) if original is not None else None

    setattr(owner, name, paced)
    sys.argv = sys.argv[4:]
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # instead of the folder of this file
    builtins.pace = lambda: None  # type: ignore[attr-defined] # what a script without a function to replace may call
    main()
