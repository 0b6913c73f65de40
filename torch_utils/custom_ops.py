"""Report on the compiled operators: python -m torch_utils.custom_ops"""

from __future__ import annotations

import sys

import click

from torch_utils.ops import doctor


@click.command()
def main() -> None:
    """Print which implementation each operator uses on this machine and why, and check its numbers.

    The exit code is 1 if an operator computes wrong numbers.
    """
    sys.exit(0 if doctor.report() else 1)


if __name__ == "__main__":
    main()
