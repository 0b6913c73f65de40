"""Read the files that describe a dataset, dataset.json and manifest.json, and the list of frames in each zip."""

import zipfile
from pathlib import Path
from typing import Any

from dnnlib.json_file import anything, either, listed, mapped, null, number, read_json, record, text, whole
from dnnlib.text import quote
from dnnlib.zips import read_json_member

DESCRIPTION = "dataset.json"
MANIFEST = "manifest.json"
FRAME_PATHS = "frame_paths.json"

MIN_FPS, MAX_FPS = 0.001, 1000.0
MAX_PARTITIONS = 99_999
MAX_EDGE = 16_384  # pixels, of frames
MAX_COUNT = 1 << 31  # of clips and frames

fps_check = number(MIN_FPS, MAX_FPS)
count_check = whole(0, MAX_COUNT)
frame_paths_check = mapped(listed(text))

_RATE = r"[0-9]{1,9}(\.[0-9]{1,9})?(e-?[0-9]{1,2})?"
_description_check = record(
    optional={
        "fps": either([null, fps_check], f"a number from {MIN_FPS:g} to {MAX_FPS:g}"),
        "hashes": mapped(text, r"[0-9]{4,}x[0-9]{4,}/[^/\\]+\.zip"),
        "num_partitions": whole(1, MAX_PARTITIONS),
        "partitions": mapped(
            record(optional={"clips": count_check, "frames": count_check, "rates": mapped(count_check, _RATE)}),
            "[0-9]{4,5}",
        ),
        "versions": mapped(anything),
    }
)
_manifest_check = record(
    {"clips": mapped(record({"frames": count_check}, {"shard": text, "sha256": mapped(text)}))},
)
_MAX_MANIFEST = 512 << 20


def read_description(root: Path) -> dict[str, Any] | None:
    """Return the contents of dataset.json, None if there is none; raise ValueError if it is damaged."""
    path = root / DESCRIPTION
    if not path.exists():
        return None
    return read_json(path, _description_check, f"delete it, then: python -m dataset_tools.merge {quote(root)} --fps 30")


def read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    """Return the clips in manifest.json, empty if there is no such file; raise ValueError if it is damaged."""
    path = root / MANIFEST
    if not path.exists():
        return {}
    remedy = f"delete it, then: python -m dataset_tools.merge {quote(root)}"
    return read_json(path, _manifest_check, remedy, _MAX_MANIFEST)["clips"]


def read_frame_paths(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Return the frames of each clip of an open zip; raise one of several errors if they cannot be read."""
    return read_json_member(archive, FRAME_PATHS, frame_paths_check)
