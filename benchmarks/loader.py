"""Time the loader: clips per second compared with a plain zip reader, the disk, and the JPEG decoder alone.

python -m benchmarks.loader                       on moving photographs, from the package iscc-samples (extra dev)
python -m benchmarks.loader --dataset data/mine   on a dataset that has both sizes
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from dataset_tools.archive import ShardWriter
from dataset_tools.frames import encode_at_sizes
from dnnlib.video import iter_video_frames
from training.contract import BatchSpec, FrameClip
from training.data.dataset import BatchStream, ClipDataset, to_device
from training.data.shards import fast_decoder, size_name

CASES = (((36, 64), 128), ((144, 256), 12))  # size and frames of a window, as in training of the two published networks
BATCH_CLIPS = 4
BATCHES = 10
CLIP_FRAMES = 200
NUM_CLIPS = 6
CPU = torch.device("cpu")

Window = list[tuple[zipfile.ZipFile, str]]  # the members of a clip


def make_dataset(root: Path, num_clips: int = NUM_CLIPS) -> None:
    """Store moving photographs at both sizes as the dataset makers do: JPEG of quality 100, 4:4:4."""
    video = next(path for path in importlib.import_module("iscc_samples").videos() if Path(path).suffix == ".3gp")
    frames = iter_video_frames(video)
    with ShardWriter(root, [size for size, _ in CASES], 0) as writer:
        for number in range(num_clips):
            with writer.clip(f"clip_{number}") as clip:
                for frame in itertools.islice(frames, CLIP_FRAMES):
                    clip(encode_at_sizes(frame, [size for size, _ in CASES]))


class PlainReader:
    """A straightforward reader of the format with zipfile, Pillow and NumPy, which converts to float immediately."""

    def __init__(self, root: Path, size: tuple[int, int]) -> None:
        self.members: dict[str, Window] = {}
        for path in sorted((root / size_name(size)).glob("*.zip")):
            archive = zipfile.ZipFile(path)
            for clip, names in json.loads(archive.read("frame_paths.json")).items():
                self.members[clip] = [(archive, f"{clip}/{name}") for name in names]

    def read(self, window: Window, flip: bool) -> torch.Tensor:
        """Return the frames of one window, float32 (3, T, H, W) in [-1, 1]."""
        frames = []
        for archive, name in window:
            with archive.open(name) as file:
                frames.append(np.array(Image.open(file)))
        video = np.stack(frames)
        if flip:
            video = video[:, :, ::-1].copy()
        return torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1

    def batch(self, windows: list[tuple[Window, bool]]) -> torch.Tensor:
        return torch.stack([self.read(*window) for window in windows])


def read_spans(windows: list[tuple[Window, bool]]) -> None:
    """Read the bytes of windows from the disk, bypassing the page cache."""
    for window, _ in windows:
        archive, last = window[0][0], window[-1][0].getinfo(window[-1][1])
        first = archive.getinfo(window[0][1]).header_offset
        assert archive.fp is not None and archive is window[-1][0]
        descriptor = archive.fp.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(descriptor, last.header_offset + last.compress_size + 100 - first, first)


def decode_all(files: list[bytes], out: np.ndarray) -> None:
    """Run the loader's JPEG decoder alone, into allocated memory."""
    simplejpeg = fast_decoder()
    for data, frame in zip(files, out, strict=True):
        if simplejpeg is not None:
            simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, buffer=frame)
        else:
            frame[...] = np.asarray(Image.open(io.BytesIO(data)))


def contest(root: Path, size: tuple[int, int], num_frames: int, repeats: int) -> dict[str, float]:
    """Return the median seconds per batch of each contestant; all take turns with each batch."""
    dataset = ClipDataset(root, [size])
    stream = BatchStream(dataset, seed=0, batch_size=BATCH_CLIPS)
    spec = BatchSpec(num_frames, (FrameClip("video", *size, 0, num_frames),))
    plain = PlainReader(root, size)
    out = np.empty((BATCH_CLIPS * num_frames, *size, 3), np.uint8)
    times: dict[str, list[float]] = {}
    for n in range(-1, repeats):
        windows = [
            (plain.members[dataset.clips[clip].path][start : start + num_frames], flip)
            for clip, start, flip in stream.items(max(n, 0), num_frames)
        ]
        files = [archive.read(name) for window, _ in windows for archive, name in window]
        batches: list[torch.Tensor] = []
        contestants: dict[str, Callable[[], object]] = {
            "disk": lambda: read_spans(windows),  # noqa: B023
            "ours": lambda: batches.append(to_device(stream.batch(max(n, 0), spec), CPU)["video"]),  # noqa: B023
            "plain": lambda: batches.append(plain.batch(windows)),  # noqa: B023
            "decoder": lambda: decode_all(files, out),  # noqa: B023
            "uint8": lambda: stream.batch(max(n, 0), spec),  # noqa: B023
        }
        for name, contestant in contestants.items():
            clock = time.perf_counter if name == "disk" else time.process_time  # other contestants use several cores
            taken = harness.seconds(contestant, clock=clock)
            if n >= 0:  # the first round is a warm-up
                times.setdefault(name, []).append(taken)
        assert torch.equal(*batches), "both loaders give the same clips"
    return {name: harness.median(seconds) for name, seconds in times.items()}


def scaling(root: Path, size: tuple[int, int], num_frames: int, counts: tuple[int, ...], rounds: int) -> list[float]:
    """Return uint8 clips per second for each number of threads: the best round, since other load only slows it down."""
    dataset = ClipDataset(root, [size])
    spec = BatchSpec(num_frames, (FrameClip("video", *size, 0, num_frames),))
    best = dict.fromkeys(counts, 0.0)
    for _, count in itertools.product(range(rounds), counts):
        stream = BatchStream(dataset, seed=0, batch_size=BATCH_CLIPS, num_workers=count)
        begin = time.perf_counter()
        for _ in stream.prefetch((n, spec) for n in range(BATCHES)):
            pass
        best[count] = max(best[count], BATCH_CLIPS * BATCHES / (time.perf_counter() - begin))
    return list(best.values())


@click.command()
@click.option("--dataset", help="Root of a dataset of 36x64 and 144x256", type=click.Path(exists=True, path_type=Path))
@harness.options(rounds=15, threads=None, device=False)
def main(dataset: Path | None, rounds: int, quick: bool, json_path: Path | None) -> None:
    """Print clips per second in one thread, and ratios of times measured alternately."""
    rounds, cases = (1, CASES[:1]) if quick else (rounds, CASES)
    report = harness.begin("loader", rounds=rounds)
    with tempfile.TemporaryDirectory() as folder:
        if dataset is None:
            dataset = Path(folder)
            make_dataset(dataset, 1 if quick else NUM_CLIPS)
        names = ("ours", "uint8", "plain", "decoder", "disk")
        table = harness.Table(
            "Clips a second of one core's time, for the disk of the clock's",
            ["window", *names, "ours/plain", "ours/decoder"],
            note="Ours and plain deliver float32 batches, uint8 is ours before to_device, decoder is the same JPEG "
            "decoder on files in memory.",
        )
        for size, num_frames in cases:
            seconds = contest(dataset, size, num_frames, rounds)
            ratios = [seconds[name] / seconds["ours"] for name in ("plain", "decoder")]
            rates = [BATCH_CLIPS / seconds[name] for name in names]
            table.rows.append([f"{size_name(size)} x{num_frames}", *rates, *ratios])
        report.add(table)
        counts = (1, 2, 4)
        title = "uint8 clips a second of the clock from decoding threads, best of the rounds"
        threads = harness.Table(title, ["window", *map(str, counts)])
        for size, num_frames in cases:
            rates = scaling(dataset, size, num_frames, counts, rounds)
            threads.rows.append([f"{size_name(size)} x{num_frames}", *rates])
        report.add(threads)
    report.finish(json_path)


if __name__ == "__main__":
    main()
