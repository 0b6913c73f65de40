"""Every frame of a large dataset is read, twice, and neither memory nor open files grow."""

import io
import json
import threading
import zipfile

import numpy as np
import psutil
import pytest
from PIL import Image

from training.contract import BatchSpec, FrameClip
from training.data.dataset import BatchStream, ClipDataset

SIZE = (8, 16)
NUM_SHARDS, CLIPS_IN_SHARD, CLIP_FRAMES = 4, 50, 1000
NUM_CLIPS = NUM_SHARDS * CLIPS_IN_SHARD
BATCH = 5
PICTURES = 97  # no divisor of anything above: a frame read in another's place shows


@pytest.fixture(scope="module")
def pictures():
    """Small JPEG files, and their pixels (PICTURES, H, W, 3)."""
    files, pixels = [], []
    for index in range(PICTURES):
        buffer = io.BytesIO()
        noise = np.random.RandomState(index).randint(0, 256, (2, 4, 3)).astype(np.uint8)
        Image.fromarray(noise).resize((SIZE[1], SIZE[0])).save(buffer, "JPEG", quality=70)
        files.append(buffer.getvalue())
        pixels.append(np.asarray(Image.open(buffer)))
    return files, np.stack(pixels)


@pytest.fixture(scope="module")
def root(tmp_path_factory, pictures):
    """Return a dataset of 200,000 frames; frame t of clip c shows picture (7 c + t) % PICTURES."""
    folder = tmp_path_factory.mktemp("soak")
    (folder / "0008x0016").mkdir()
    for shard in range(NUM_SHARDS):
        names = [f"frame_{frame:06d}.jpg" for frame in range(CLIP_FRAMES)]
        numbers = range(shard * CLIPS_IN_SHARD, (shard + 1) * CLIPS_IN_SHARD)
        with zipfile.ZipFile(folder / "0008x0016" / f"partition_{shard:04d}.zip", "w") as archive:
            for clip in numbers:
                for frame, name in enumerate(names):
                    archive.writestr(f"clip_{clip:04d}/{name}", pictures[0][(7 * clip + frame) % PICTURES])
            archive.writestr("frame_paths.json", json.dumps({f"clip_{clip:04d}": names for clip in numbers}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "ram"])
def test_nothing_grows_while_every_frame_is_read(root, pictures, cache):
    process = psutil.Process()
    files_before, threads_before = process.num_fds(), threading.active_count()
    dataset = ClipDataset(root, [SIZE], cache)
    assert len(dataset.clips) == NUM_CLIPS
    stream = BatchStream(dataset, seed=0, batch_size=BATCH, num_workers=4)
    spec = BatchSpec(CLIP_FRAMES, (FrameClip("video", *SIZE, 0, CLIP_FRAMES),))  # whole clips: an epoch is every frame
    in_epoch = NUM_CLIPS // BATCH
    memory, files, seen = [], set(), []
    for n, batch in enumerate(stream.prefetch((n, spec) for n in range(3 * in_epoch))):
        for (clip, _, _), video in zip(stream.items(n, CLIP_FRAMES), batch["video"].numpy(), strict=True):
            assert np.array_equal(video, pictures[1][(7 * clip + np.arange(CLIP_FRAMES)) % PICTURES])
            seen.append(clip)
        memory.append(process.memory_info().rss)
        files.add(process.num_fds() - files_before)
    assert all(sorted(seen[i : i + NUM_CLIPS]) == list(range(NUM_CLIPS)) for i in range(0, 3 * NUM_CLIPS, NUM_CLIPS))
    growth = max(memory[2 * in_epoch :]) - max(memory[in_epoch // 2 if cache == "none" else in_epoch : 2 * in_epoch])
    print(f"\nmemory {memory[0] >> 20} MiB at first, {memory[-1] >> 20} at last, {growth >> 10} KiB in the last epoch")
    assert growth < 8 << 20
    assert max(files) == NUM_SHARDS
    assert threading.active_count() == threads_before
