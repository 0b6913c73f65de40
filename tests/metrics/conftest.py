"""A small dataset and a separate cache folder."""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib import util
from training.random import random_state

NUM_FRAMES = {"a/long": 40, "a/short": 12, "b/middle": 25}


def write_dataset(root: Path, size: tuple[int, int], num_frames: dict[str, int] = NUM_FRAMES) -> None:
    """Write clips of smooth noise that drifts to the right: `<root>/<HHHHxWWWW>/partition_0000.zip`."""
    folder = root / f"{size[0]:04d}x{size[1]:04d}"
    folder.mkdir(parents=True)
    frame_paths = {}
    with zipfile.ZipFile(folder / "partition_0000.zip", "w") as archive:
        for clip in num_frames:
            coarse = random_state("test-clip", 0, clip).randint(256, size=(4, 6, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))
            frame_paths[clip] = [f"{number:06d}.jpg" for number in range(num_frames[clip])]
            for number, name in enumerate(frame_paths[clip]):
                buffer = io.BytesIO()
                Image.fromarray(np.roll(image, number, axis=1)).save(buffer, "jpeg", quality=95)
                archive.writestr(f"{clip}/{name}", buffer.getvalue())
        archive.writestr("frame_paths.json", json.dumps(frame_paths))
    (root / "dataset.json").write_text(json.dumps({"fps": 30}))


@pytest.fixture(scope="session")
def make_dataset() -> Callable[[Path, Sequence[tuple[int, int]]], Path]:
    """Write three clips of 40, 12 and 25 frames at each of the sizes and returns the folder."""

    def make(root: Path, sizes: Sequence[tuple[int, int]]) -> Path:
        for size in sizes:
            write_dataset(root, size)
        return root

    return make


@pytest.fixture(scope="session")
def dataset_path(make_dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That dataset at 16x24 and at 8x12."""
    return make_dataset(tmp_path_factory.mktemp("tiny"), [(16, 24), (8, 12)])


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache that has the detectors' weights and the compiled operators all the same."""
    (tmp_path / "cache").mkdir()
    for name in ("detectors", "kernels"):
        shared = Path(util.make_cache_dir_path(name))
        shared.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).symlink_to(shared)
    monkeypatch.setattr(util, "_cache_dir", str(tmp_path / "cache"))
    return tmp_path / "cache"
