"""Read and write the files beside the checkpoints of a run: they inform, and no damage to them stops a run.

What does not parse is dropped, with one warning that names the file; a file that is missing is empty. Imports no torch.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnnlib.util import atomic_path

LARGEST = sys.float_info.max  # above it are infinities, and whole numbers that no float holds; NaN is not below it


def read_object(path: Path, warns: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is none that can be read."""
    value = _parse(_read(path))
    if isinstance(value, dict):
        return value
    if path.exists() and warns:
        warn_once(f"{path} holds no JSON object that can be read; what it should say is left out")
    return {}


def read_lines(path: Path, **types: type) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file that have entries of the given types, such as step=int."""
    lines = [line for line in _read(path).split(b"\n") if line.strip()]
    values = [value for line in lines if isinstance(value := _parse(line), dict)]
    found = [value for value in values if all(type(value.get(name)) is kind for name, kind in types.items())]
    if len(found) < len(lines) or (path.exists() and not path.is_file()):
        warn_once(f"{path} is damaged; {len(lines) - len(found)} of its {len(lines)} lines are left out")
    return found


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON object to a JSON Lines file; NaN and infinities become null.

    Raises OSError if the write fails, and leaves the file unchanged: a partial line would corrupt the next one.
    """
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        is_cut = file.read(1) not in (b"", b"\n")  # by a crash
    try:
        with open(path, "ab") as file:
            file.write(b"\n" * is_cut + json.dumps(_finite(values)).encode() + b"\n")
    except OSError:
        os.truncate(path, size)
        raise


def forget_after(path: Path, step: int) -> None:
    """Remove the lines of a JSON Lines file for steps after `step`, and those that cannot be read."""
    if path.is_file():
        lines = [line for line in read_lines(path, step=int) if line["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(_finite(line)) + "\n" for line in lines))


def metric_values(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a metric: the numbers under `results` if the result has that entry, else its own numbers."""
    values = result.get("results", result)
    values = values if isinstance(values, Mapping) else {}
    numbers = {key: value for key, value in values.items() if type(value) in (int, float) and abs(value) <= LARGEST}
    return {key: float(value) for key, value in numbers.items() if key not in ("step", "timestamp")}


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning to stderr, once in a process."""
    print(f"Warning: {text}.", file=sys.stderr, flush=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        warn_once(f"{path} cannot be read ({error.strerror}); what it should say is left out")
        return b""


def _parse(data: bytes) -> Any:
    """Return the value of a JSON text, None if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
