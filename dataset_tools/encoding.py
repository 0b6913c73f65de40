"""Encoding of the frames of a dataset by a tokenizer; dataset_tools.encode_dataset is the command."""

import collections
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch

from dataset_tools import archive
from dnnlib import locks, util
from dnnlib.download import file_sha256
from dnnlib.text import quote
from torch_utils.precision import set_precision, tf32
from training.contract import Tokenizer
from training.data import codes, grids, latents
from training.data.audio_store import AudioStore, has_audio
from training.data.dataset import ClipDataset, Size, to_float
from training.data.layouts.base import LayoutStore
from training.data.shards import FrameStore
from training.data.spectrograms import is_of_sound
from training.data.streams import read_stream, stored_streams
from training.network_file import load_tokenizer

_CHUNKS_AHEAD = 3  # decoded chunks of frames, besides the one being encoded


@dataclass
class _Job:
    """A dataset, its tokenizer, and the destination of the tokens or latents."""

    dataset: ClipDataset
    tokenizer: Any  # a Tokenizer, and a network
    device: torch.device
    out: Path
    manifest: codes.CodesManifest | latents.LatentsManifest  # of all partitions; the file lists the ones that exist
    batch: int
    workers: int
    tally: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def folder(self) -> Path:
        """Return the folder of the arrays."""
        return self.manifest.kind.folder(self.out, self.manifest.tokenizer)

    @property
    def size(self) -> Size:
        """Return the size of the frames that are read."""
        return self.manifest.size


# ----------------------------------------------------------------------------
# The tokenizer.


def _probe(tokenizer: Tokenizer, device: torch.device) -> tuple[int, int]:
    """Return the grid of a tokenizer: cells along height and width.

    Raises `ValueError` if its output does not match its attributes, or if its vocabulary exceeds the storage format.
    """
    if not tokenizer.vocabulary:
        raise ValueError("the tokenizer has continuous latents, no codes: store them by --latents")
    if not 0 < tokenizer.vocabulary <= codes.MAX_VOCABULARY:
        raise ValueError(
            f"the tokenizer has a vocabulary of {tokenizer.vocabulary}, but stored tokens are below "
            f"{codes.MAX_VOCABULARY}; take a tokenizer with fewer"
        )
    video = torch.zeros(1, 3, tokenizer.clip_frames, tokenizer.height, tokenizer.width, device=device)
    steps = tokenizer.clip_frames // tokenizer.stride[0]
    found = tokenizer.encode(video)
    if found.dim() != 4 or found.shape[:2] != (1, steps) or tokenizer.clip_frames % tokenizer.stride[0]:
        raise ValueError(
            f"the tokenizer makes tokens {list(found.shape)} of {tokenizer.clip_frames} frames, but [1, {steps}, h, w] "
            f"was expected, as a step is {tokenizer.stride[0]} frames; correct its clip_frames or its stride"
        )
    return int(found.shape[2]), int(found.shape[3])


def _probe_latents(tokenizer: Any, device: torch.device) -> tuple[int, int, int]:
    """Return channels, height and width of a tokenizer's latents; raise `ValueError` if it has none that fit."""
    if not hasattr(tokenizer, "latents"):
        raise ValueError("the tokenizer has no latents before quantization; leave out --latents")
    video = torch.zeros(1, 3, tokenizer.clip_frames, tokenizer.height, tokenizer.width, device=device)
    steps = tokenizer.clip_frames // tokenizer.stride[0]
    found = tokenizer.latents(video)
    if found.dim() != 5 or found.shape[0] != 1 or found.shape[2] != steps:
        raise ValueError(
            f"the tokenizer makes latents {list(found.shape)} of {tokenizer.clip_frames} frames, but [1, C, {steps}, "
            "h, w] was expected; correct its clip_frames or its stride"
        )
    return int(found.shape[1]), int(found.shape[3]), int(found.shape[4])


def _encode(job: _Job, frames: np.ndarray) -> np.ndarray:
    """Encode successive clips uint8 (n, T, H, W, 3), and return their concatenated arrays: (steps, *step_shape)."""
    video = to_float(torch.from_numpy(frames), job.device)
    if isinstance(job.manifest, latents.LatentsManifest):
        return _encode_latents(job, video)
    found = job.tokenizer.encode(video).cpu().numpy()
    if found.min(initial=0) < 0 or found.max(initial=0) >= job.manifest.vocabulary:
        raise ValueError(
            f"the tokenizer makes tokens from {found.min()} to {found.max()}, but its vocabulary is "
            f"{job.manifest.vocabulary}; correct the tokenizer"
        )
    return found.reshape(-1, *job.manifest.grid).astype(codes.DTYPE)


def _encode_latents(job: _Job, video: torch.Tensor) -> np.ndarray:
    """Return the latents of clips (n, 3, T, H, W) as float16 (steps, C, h, w)."""
    found = job.tokenizer.latents(video).movedim(1, 2).reshape(-1, *job.manifest.step_shape)
    largest = found.abs().max().item() if found.numel() else 0.0
    limit = float(np.finfo(latents.DTYPE).max)
    if not largest <= limit:
        raise ValueError(
            f"the tokenizer makes latents up to {largest:g}, but stored ones are finite float16 up to "
            f"{limit:g}; take another tokenizer"
        )
    return found.to(torch.float16).cpu().numpy().astype(latents.DTYPE, copy=False)


# ----------------------------------------------------------------------------
# Frames.


def _chunks(job: _Job, clips: Sequence[int]) -> Iterator[tuple[int, range, int]]:
    """Yield the chunks to encode: a clip, its frames, and the number of frames that are encoded together.

    Chunks never mix clips, so that tokens do not depend on the division of clips into partitions.
    """
    length = job.tokenizer.clip_frames
    for clip in clips:
        num_frames = job.dataset.clips[clip].num_frames
        whole = num_frames // length * length
        for first in range(0, whole, job.batch * length):
            yield clip, range(first, min(first + job.batch * length, whole)), length
        if whole < num_frames and job.manifest.stride[0] == 1:
            yield clip, range(whole, num_frames), num_frames - whole


def _decoded(job: _Job, clips: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a clip's number and its next frames, uint8 (n, T, H, W, 3), decoded by threads some chunks ahead."""
    ahead = collections.deque[tuple[int, np.ndarray, list[concurrent.futures.Future[None]]]]()

    def finish() -> tuple[int, np.ndarray]:
        clip, frames, futures = ahead.popleft()
        for future in futures:
            future.result()
        return clip, frames

    with concurrent.futures.ThreadPoolExecutor(job.workers, thread_name_prefix="decode") as pool:
        try:
            for clip, span, length in _chunks(job, clips):
                frames = np.empty((len(span) // length, length, *job.size, 3), np.uint8)
                flat, piece = frames.reshape(-1, *job.size, 3), max(-(-len(span) // job.workers), 1)
                parts = range(0, len(span), piece)
                read = job.dataset.read_into
                futures = [pool.submit(read, flat[i : i + piece], clip, span[i : i + piece]) for i in parts]
                ahead.append((clip, frames, futures))
                if len(ahead) > _CHUNKS_AHEAD:
                    yield finish()
            while ahead:
                yield finish()
        finally:
            pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------
# Shards.


def _is_made(job: _Job, index: int, clips: Sequence[int]) -> bool:
    """Return whether a partition exists, complete, and for these frames."""
    if not (job.folder / grids.MANIFEST).exists():
        return False
    known = job.manifest.read(job.folder)
    entry, path = known.partitions.get(f"{index:04d}"), job.folder / archive.shard_name(index)
    if entry is None or known.facts() != job.manifest.facts() or entry.get("source") != _source(job, clips):
        return False
    return path.exists() == bool(clips) and (not clips or file_sha256(path) == entry.get("sha256"))


def _source(job: _Job, clips: Sequence[int]) -> str:
    """Return a hash that identifies the frames of a partition."""
    return job.dataset.store(job.size).content_key(clips)


def _make_shard(job: _Job, index: int, clips: Sequence[int], bar: Any) -> None:
    """Write the arrays of a partition, then its entry in the manifest."""
    path = job.folder / archive.shard_name(index)
    job.folder.mkdir(parents=True, exist_ok=True)
    num_frames = sum(job.dataset.clips[clip].num_frames for clip in clips)
    entry: dict[str, Any] = {"clips": len(clips), "frames": num_frames, "steps": 0}
    moments = None
    if isinstance(job.manifest, latents.LatentsManifest):
        moments = latents.Moments.none(job.manifest.channels)
    if clips:
        with util.atomic_path(path) as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as shard:
                for array in _fill(job, shard, clips, bar):
                    entry["steps"] += len(array)
                    moments = moments and moments + latents.Moments.of(array)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        entry |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    else:
        path.unlink(missing_ok=True)
    if moments:
        entry["moments"] = moments.to_json()
    _describe(job, index, {**entry, "source": _source(job, clips)})


def _fill(job: _Job, shard: zipfile.ZipFile, clips: Sequence[int], bar: Any) -> Iterator[np.ndarray]:
    """Encode clips into a zip, and yield the array of each."""
    pieces: dict[int, list[np.ndarray]] = {clip: [] for clip in clips}
    waiting = collections.deque(clips)
    shape, dtype = job.manifest.step_shape, job.manifest.kind.dtype

    def store_until(clip: int | None) -> Iterator[np.ndarray]:
        while waiting and waiting[0] != clip:
            done = waiting.popleft()
            array = np.concatenate([np.empty((0, *shape), dtype), *pieces.pop(done)])
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
            archive.store_member(shard, _member(job, done), buffer.getvalue())
            yield array

    for clip, frames in _decoded(job, clips):
        yield from store_until(clip)
        pieces[clip].append(_encode(job, frames))
        job.tally["encoded frames"] += frames.shape[0] * frames.shape[1]
        bar.update(frames.shape[0] * frames.shape[1], job.dataset.clips[clip].path)
    yield from store_until(None)
    listed = {job.dataset.clips[clip].path: [_member(job, clip), job.dataset.clips[clip].num_frames] for clip in clips}
    archive.store_member(shard, grids.CLIPS, json.dumps(listed, indent=1).encode())
    for name, values in _stream_values(job, clips).items():
        archive.store_member(shard, f"{name}.json", json.dumps(values).encode())
    if has_audio(job.dataset.path):
        store = AudioStore(job.dataset.path, job.dataset.clips)
        wanted = {job.dataset.clips[clip].path: store.read_all(clip) for clip in clips}
        archive.store_audio(shard, wanted)


def _member(job: _Job, clip: int) -> str:
    return f"{job.dataset.clips[clip].path}.npy"


def _stream_values(job: _Job, clips: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the streams of clips, so that tokens can be used without frames."""
    store, layout = job.dataset.store(job.size), job.dataset.layout
    if isinstance(store, LayoutStore):
        assert layout is not None
        return {name: layout.values(name, clips) for name in layout.stream_names()}
    found: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(store.shards[store.clip_shards[clip]] for clip in clips):
        for name in stored_streams(path):
            found.setdefault(name, {}).update(read_stream(path, name))
    names = [job.dataset.clips[clip].path for clip in clips]
    return {
        stream: {name: values[name] for name in names if name in values} for stream, values in sorted(found.items())
    }


def _describe(job: _Job, index: int | None, entry: dict[str, Any] | None) -> None:
    """Add a partition to the manifest; without one, remove partitions that were made with different facts."""
    path = job.folder / grids.MANIFEST
    with locks.locked(job.folder / f"{grids.MANIFEST}.lock"):
        before = job.manifest.read(job.folder) if path.exists() else job.manifest
        known = before.partitions if before.facts() == job.manifest.facts() else {}
        if index is not None and entry is not None:
            known = {**known, f"{index:04d}": entry}
        content = {**asdict(job.manifest), "partitions": known}
        if isinstance(job.manifest, latents.LatentsManifest):
            content |= latents.statistics([known[name] for name in sorted(known)], job.manifest.channels)
        with util.atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _refuse_mixture(job: _Job, indices: Sequence[int]) -> None:
    """Raise `ValueError` if partitions made with different facts would be kept; remove those to be made again."""
    if not (job.folder / grids.MANIFEST).exists():
        return
    known, noun = job.manifest.read(job.folder), job.manifest.kind.noun
    if known.tokenizer != job.manifest.tokenizer:
        raise ValueError(
            f"{job.folder} holds {noun} of another tokenizer (SHA-256 {known.tokenizer[:16]}...) than this one "
            f"({job.manifest.tokenizer[:16]}...); move it away"
        )
    before, now = known.facts(), job.manifest.facts()
    changed = [f"{name} is {before[name]}, not {now[name]}" for name in now if before[name] != now[name]]
    if not changed:
        return
    if len(indices) < job.manifest.num_partitions:
        raise ValueError(
            f"{job.folder} was made otherwise ({'; '.join(changed)}); delete it, or give another output folder by --out"
        )
    for path in job.folder.glob("*.zip"):
        path.unlink()
    _describe(job, None, None)


@torch.inference_mode()
def encode_dataset(
    root: Path,
    tokenizer_path: str,
    out: Path | None = None,
    batch: int = 16,
    workers: int | None = None,
    device: str | None = None,
    partition: int | None = None,
    num_partitions: int | None = None,
    is_latents: bool = False,
    precision: str = "fp32",
) -> None:
    """Encode all frames of a dataset and print the results; raise `ValueError` if it cannot be done."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer, sha256 = load_tokenizer(tokenizer_path, where)
    set_precision([cast(torch.nn.Module, tokenizer)], precision)
    if is_of_sound(tokenizer):
        raise ValueError(
            f"{tokenizer_path} encodes sound, which training does as it goes: give a tokenizer of frames, and this one "
            "as --audio-tokenizer of train.py tats"
        )
    size = (tokenizer.height, tokenizer.width)
    dataset = ClipDataset(root, [size])
    if out is None and not root.is_dir():
        raise ValueError(f"{root} is no folder, beside whose frames the result could be written: give --out")
    store = dataset.store(size)
    num_partitions = num_partitions or (len(store.shards) if isinstance(store, FrameStore) else 1)
    with tf32(False):  # so that equal frames give equal tokens
        facts: dict[str, Any] = {
            "tokenizer": sha256,
            "stride": (tokenizer.stride[0], tokenizer.stride[1]),
            "size": size,
            "clip_frames": tokenizer.clip_frames,
            "fps": dataset.fps,
            "num_partitions": num_partitions,
            "partitions": {},
        }
        if is_latents:
            channels, *grid = _probe_latents(tokenizer, where)
            manifest = latents.LatentsManifest(grid=(grid[0], grid[1]), channels=channels, mean=(), std=(), **facts)
        else:
            grid = _probe(tokenizer, where)
            manifest = codes.CodesManifest(grid=grid, vocabulary=tokenizer.vocabulary, **facts)
        workers = workers or len(os.sched_getaffinity(0))
        job = _Job(dataset, tokenizer, where, out or root, manifest, batch, workers)
        _make(job, range(num_partitions) if partition is None else [partition])
    _say(job, partition)


def _make(job: _Job, indices: Sequence[int]) -> None:
    """Encode the missing partitions under a progress bar."""
    numbers = range(len(job.dataset.clips))
    parts = {index: archive.partition(numbers, index, job.manifest.num_partitions) for index in indices}
    _refuse_mixture(job, indices)
    missing = {index: clips for index, clips in parts.items() if not _is_made(job, index, clips)}
    num_bytes = sum(job.dataset.store(job.size).num_bytes(clip) for clips in parts.values() for clip in clips)
    job.tally.update({"shards": len(parts), "made": len(missing), "frame bytes": num_bytes})
    total = sum(len(span) for clips in missing.values() for _, span, _ in _chunks(job, clips))
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        show = functools.partial(_tail, 40)
        bar = stack.enter_context(click.progressbar(length=total, label="Encoding frames", item_show_func=show))
        for index, clips in missing.items():
            _make_shard(job, index, clips, bar)
    job.tally["milliseconds"] = int(1000 * (time.monotonic() - begin))
    made = job.manifest.read(job.folder).partitions
    for index in indices:
        entry = made[f"{index:04d}"]
        job.tally.update({name: entry.get(name, 0) for name in ("clips", "steps", "bytes")})


def _tail(length: int, item: Any) -> str | None:
    return None if item is None else str(item)[-length:]


def _say(job: _Job, partition: int | None) -> None:
    """Print the results, the speed, and the next command."""
    tally = job.tally
    if kept := tally["shards"] - tally["made"]:
        click.echo(f"{kept} of {tally['shards']} shards were there already.")
    if tally["encoded frames"]:
        rate = tally["encoded frames"] / max(tally["milliseconds"] / 1000, 1e-3)
        click.echo(f"{tally['encoded frames']} frames encoded, {rate:.0f} frames per second.")
    megabytes, before = tally["bytes"] / 1e6, tally["frame bytes"] / 1e6
    grid, noun = "x".join(map(str, job.manifest.step_shape)), job.manifest.kind.noun
    part = "" if partition is None else f"partition {partition} of "
    finish = "" if partition is None else ", when all are made"
    click.echo(
        f"{tally['clips']} clips, {tally['steps']} steps of {grid} {noun} are in {part}{job.folder}, {megabytes:.3g} "
        f"MB of {noun} for {before:.3g} MB of frames. Next{finish}: python -m dataset_tools.inspect_dataset "
        f"{quote(job.out)}"
    )
