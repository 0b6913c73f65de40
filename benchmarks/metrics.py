"""Time the metrics: the Frechet distance compared with SciPy's, batched features with single clips, and overlap.

python -m benchmarks.metrics
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import scipy.linalg
import torch
from PIL import Image

from benchmarks.loader import make_dataset
from dnnlib import util
from metrics import extraction, jackknife, kernel, plan, samplers
from metrics.detectors import i3d, registry
from metrics.extraction import FeatureRequest
from metrics.families import ClipShape
from metrics.frechet import FeatureStats, frechet_distance_from_features
from metrics.inputs import open_videos
from metrics.plan import Work
from metrics.protocols import PROTOCOLS
from metrics.samplers import ItemBatch
from training.data.dataset import ClipDataset
from training.data.shards import size_name
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.presets import STAGES
from training.longvideogan.sampling import LowResSampler

FRECHET_CASES = ((400, 2048), (400, 256), (2048, 512))  # dimensions, vectors per side
SIZE, SHAPE = (144, 256), ClipShape(16)
BATCHES, ROUNDS = (1, 4, 8), 3
DETECTORS = ("i3d-kinetics-400", "efficientnet-lite0-motion")


def plain_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Frechet distance directly, by `np.cov` and the square root of the product."""
    cov_a, cov_b = np.cov(a.T, bias=True), np.cov(b.T, bias=True)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root))


def seconds(function: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Return the minimum processor time of a call, and its result."""
    times, result = [], None
    for _ in range(repeats):
        begin = time.process_time()
        result = function()
        times.append(time.process_time() - begin)
    return min(times), result


def time_frechet() -> None:
    """Time both implementations on the same features, and the additional cost of standard errors."""
    for dim, num in FRECHET_CASES:
        rng = np.random.RandomState(0)
        scale = np.arange(1, dim + 1) ** -0.5
        a, b = (rng.standard_normal((num, dim)) * scale + shift for shift in (0, 0.01))
        ours, value = seconds(lambda a=a, b=b: frechet_distance_from_features(a, b))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy warns about singular matrices
            plain, expected = seconds(lambda a=a, b=b: plain_frechet(a, b), repeats=1)
        click.echo(
            f"Frechet term, {num} vectors of {dim}: {ours:.3f} s, SciPy {plain:.2f} s, {plain / ours:.0f} times as "
            f"fast; {value:.6f} and {expected:.6f}"
        )
    x = np.random.RandomState(1).standard_normal((2048, 400)).astype(np.float32)
    groups = jackknife.group_videos(range(2048), jackknife.NUM_GROUPS)
    taken, _ = seconds(lambda: FeatureStats.of(x, None, groups, jackknife.NUM_GROUPS), 1)
    click.echo(f"Moments of 2048 vectors of 400 in {jackknife.NUM_GROUPS} groups: {taken:.2f} s")
    taken, _ = seconds(lambda: kernel.kernel_sums(x, x, groups, groups, jackknife.NUM_GROUPS), 1)
    click.echo(f"Kernel distance of 2048 against 2048 over all pairs, with errors: {taken:.2f} s")


class Timed:
    """A detector that counts the time spent in it."""

    def __init__(self, detector: Any) -> None:
        self.detector, self.identity, self.total = detector, detector.identity, 0.0

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """Return the detector's features."""
        begin = time.process_time()
        found = self.detector.features(video)
        self.total += time.process_time() - begin
        return found


def one_at_a_time(root: Path, num_items: int, detector: Timed) -> torch.Tensor:
    """Compute features directly: for each clip, zipfile, Pillow, and the detector."""
    members = {}
    for path in sorted((root / size_name(SIZE)).glob("*.zip")):
        archive = zipfile.ZipFile(path)
        for clip, names in json.loads(archive.read("frame_paths.json")).items():
            members[clip] = (archive, [f"{clip}/{name}" for name in names])
    dataset = ClipDataset(root, [SIZE])
    found = []
    for window in samplers.shuffled_windows(dataset, "metric-real", 0, num_items, SHAPE.span):
        archive, names = members[dataset.clips[window.clip].path]
        frames = []
        for name in names[window.start : window.start + SHAPE.span]:
            with archive.open(name) as file:
                frames.append(np.array(Image.open(file)))
        found.append(detector.features(torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]))
    return torch.cat(found)


def time_features(root: Path, name: str, num_items: int) -> None:
    """Print seconds per clip, one at a time and by the metrics' own pass, at several batch sizes."""
    detector = Timed(registry.open_detector(name))
    side = open_videos(root, SIZE)
    detector.features(torch.zeros(1, 3, SHAPE.num_frames, *SIZE, dtype=torch.uint8))  # warm-up
    request = FeatureRequest("clips", SHAPE, num_items, name, "features")

    def ours(batch: int) -> torch.Tensor | None:
        work = _TimedWork(PROTOCOLS["lvg"], 0, torch.device("cpu"), batch, replace_cache=True)
        work.detectors[name] = detector
        return plan.collect([request], side, "real", work)[0][request].values

    contestants: dict[str, Callable[[], torch.Tensor | None]] = {
        "one clip at a time, by hand": lambda: one_at_a_time(root, num_items, detector),
        **{f"{batch} at a time": functools.partial(ours, batch) for batch in BATCHES},
    }
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in contestants}
    found = {}
    for _ in range(ROUNDS):  # alternating, as the machine may be shared
        for label, contestant in contestants.items():
            detector.total = 0.0
            begin = time.process_time()
            found[label] = contestant()
            taken = time.process_time() - begin
            times[label].append((taken / num_items, 1 - detector.total / taken))
    first, *others = found.values()
    assert all(torch.allclose(other, first, rtol=1e-3, atol=1e-3) for other in others), "the same features"
    for label, rounds in times.items():
        taken, share = min(rounds)
        click.echo(f"{name}, {label}: {taken:.3f} s a clip, of which {100 * share:.1f} % outside of the network")


def time_i3d(num_items: int = 4) -> None:
    """Print how many times as fast I3D is as by one operator after the other, and how much its features differ."""
    detector = registry.open_detector(DETECTORS[0])
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (num_items, 3, SHAPE.num_frames, *SIZE), generator=generator, dtype=torch.uint8)
    plain = mock.patch.object(i3d, "_has_fused", return_value=False)
    ratios = []
    for number in range(ROUNDS + 1):
        ours, found = seconds(lambda: detector.features(clips), 1)
        with plain:
            theirs, expected = seconds(lambda: detector.features(clips), 1)
        ratios += [theirs / ours] if number else []  # the first round warms up
        distance = float((found - expected).norm() / expected.norm())
    spread = f"{statistics.median(ratios):.2f} times as fast as one operator after the other"
    click.echo(
        f"I3D: {ours / num_items:.3f} s a clip, {spread} ({min(ratios):.2f} to {max(ratios):.2f}); features differ by "
        f"{distance:.1g} of their norm"
    )


def time_overlap(num_items: int = 4) -> None:
    """Time generation of clips (16 frames at spacing 8) and their I3D features, sequentially and overlapped.

    Overlapped, the next clip is generated meanwhile; on a CPU this needs a second core and one thread each. Wall-clock
    time.
    """
    sampler = LowResSampler(LowResGenerator(18, 32, **STAGES["longvideogan-lres"]["toy"]["model"]["generator"]))
    shape = ClipShape(16, 8)
    detector = registry.open_detector(DETECTORS[0])

    def batches() -> Iterator[ItemBatch]:
        return samplers.generated_batches(sampler, {shape: num_items}, range(num_items), 0, 1)

    def look(batch: ItemBatch) -> None:
        detector.features(batch.clips[shape])

    def in_turn() -> None:
        for batch in batches():
            look(batch)

    def overlapped() -> None:
        extraction.run(batches(), look, torch.device("cpu"))

    times: dict[str, list[float]] = {"one after the other": [], "overlapped": []}
    for _ in range(ROUNDS):
        for taken, contestant in zip(times.values(), (in_turn, overlapped), strict=True):
            begin = time.monotonic()
            contestant()
            taken.append((time.monotonic() - begin) / num_items)
    texts = [f"{label} {min(taken):.2f} s a clip" for label, taken in times.items()]
    click.echo(f"Generation and features by the clock: {', '.join(texts)}")


class _TimedWork(Work):
    detectors: dict[str, Timed] = {}

    def open(self, detector: str) -> Timed:
        return self.detectors[detector]


@click.command(help=__doc__)
@click.option("--clips", help="Clips whose features are timed", default=8, show_default=True)
def main(clips: int) -> None:
    torch.set_num_threads(1)
    time_frechet()
    with tempfile.TemporaryDirectory() as folder:
        root, weights = Path(folder) / "footage", Path(util.make_cache_dir_path("detectors"))
        make_dataset(root)
        cache = Path(folder) / "cache"
        cache.mkdir()
        (cache / "detectors").symlink_to(weights)
        util.set_cache_dir(cache)
        time_i3d()
        for name in DETECTORS:
            time_features(root, name, clips)
    time_overlap()


if __name__ == "__main__":
    main()
