"""Metrics by name: values that depend only on the clips, complete results, one pass for all metrics."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from metrics import extraction, inputs, kernel, long_video, metric_main, samplers
from metrics.detectors import registry
from metrics.families import ClipShape
from metrics.frechet import frechet_distance_from_features
from metrics.plan import Generated
from tests.metrics.conftest import write_dataset
from tests.ranks import run_ranks
from training.data.dataset import ClipDataset
from training.random import random_state
from training.sampling import Needs, Request, Sampler

SIZE = (16, 24)


class Noise(Sampler):
    """Noise that is a function of seed and frame, as a generator's video is."""

    period, outputs = 4, {"video": SIZE}

    def video(self, request: Request) -> Iterator[Tensor]:
        assert request.num_frames is not None
        for done in range(0, request.num_frames, 5):
            count = min(5, request.num_frames - done)
            yield torch.from_numpy(
                np.stack(
                    [
                        [random_state("test-noise", seed, f).randint(256, size=(*SIZE, 3), dtype=np.uint8)
                         for f in range(first + done, first + done + count)]
                        for seed, first in zip(request.seeds, request.starts, strict=True)
                    ]
                )
            )  # fmt: skip


def measure(dataset_path: Path, **options: Any) -> dict[str, Any]:
    real = inputs.Videos(ClipDataset(dataset_path, [SIZE]), SIZE, "dataset")
    (result,) = metric_main.calc_metrics(["fmd3_4f"], real, Generated(Noise()), **options)
    return result


def moving_pictures(num_videos: int, num_frames: int, first: int = 0, scale: int = 1) -> np.ndarray:
    """Smooth patterns that drift, a video each: uint8 (N, T, H, W, 3)."""
    height, width = SIZE[0] * scale, SIZE[1] * scale
    videos = []
    for number in range(first, first + num_videos):
        rng = random_state("test-moving", 0, number)
        coarse = rng.randint(256, size=(4, 6, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        speed = int(rng.randint(1, 4))
        videos.append(np.stack([np.roll(image, speed * frame, axis=1) for frame in range(num_frames)]))
    return np.stack(videos)


def side(videos: np.ndarray, name: str = "videos") -> inputs.Videos:
    arrays = inputs.Arrays(videos, name)
    return inputs.Videos(arrays, arrays.size, "array")


def test_value_depends_neither_on_batch_nor_on_cache(dataset_path: Path, own_cache: Path, capsys):
    told = []
    first = measure(dataset_path, batch=2, progress=lambda *report: told.append(report))
    assert [report for report in told if report[1] == report[2]] == [("real", 3, 3), ("generated", 3, 3)]
    assert len(list((own_cache / "metrics").glob("*.npz"))) == 1

    told.clear()
    hit = measure(dataset_path, batch=1, progress=lambda *report: told.append(report))
    assert {side for side, *_ in told} == {"generated"}, "real features came from the cache"
    again = measure(dataset_path, batch=1, replace_cache=True)
    value = first["results"]["fmd3_4f"]
    assert value > 0
    assert hit["results"]["fmd3_4f"] == pytest.approx(value, rel=1e-6)
    assert again["results"]["fmd3_4f"] == pytest.approx(value, rel=1e-6)

    assert (first["num_real"], first["num_fake"], first["world_size"]) == (3, 3, 1)
    assert first["detector"]["verified"]
    assert first["protocol"]["name"] == "lvg" and first["protocol"]["frame_spacing"] == 1
    assert "measured on 3 clips; below 256" in first["warning"]
    assert first["warning"] in capsys.readouterr().out
    assert json.loads(json.dumps(first)) == first


def test_clips_that_are_too_short_are_refused(dataset_path: Path, own_cache: Path):
    real = inputs.Videos(ClipDataset(dataset_path, [SIZE]), SIZE, "dataset")
    with pytest.raises(ValueError, match="no clip of 41 frames"):
        metric_main.calc_metrics(["fvd4_41f"], real, Generated(Noise()))


def test_weights_that_are_missing_are_said_with_the_remedy(own_cache: Path):
    videos = side(moving_pictures(2, 4))
    with pytest.raises(ValueError, match="weights of detector inception-2015-12-05 are not in the cache"):
        metric_main.calc_metrics(["fid50k_full"], videos, videos)


def test_one_pass_of_the_sampler_serves_all_metrics(own_cache: Path):
    """Values are those that each metric has alone, and of the detectors' own features by the plain formulas."""
    asked = []

    class Asked(Noise):
        def video(self, request: Request) -> Iterator[Tensor]:
            asked.extend(request.seeds)
            return super().video(request)

    names = ["fmd6_4f", "fd9_efflite0", "fmd4_3f"]
    real = side(moving_pictures(7, 4))
    together = metric_main.calc_metrics(names, real, Generated(Asked()))
    assert len(asked) == len(set(asked)) == 9, "each video was generated once"
    for name, result in zip(names, together, strict=True):
        (alone,) = metric_main.calc_metrics([name], real, Generated(Noise()), replace_cache=True)
        assert result["results"] == pytest.approx(alone["results"], rel=1e-5)
        assert result["errors"] == pytest.approx(alone["errors"], rel=1e-4)
    assert [(result["num_real"], result["num_fake"]) for result in together] == [(6, 6), (28, 9), (4, 4)]

    frames = torch.from_numpy(moving_pictures(7, 4)).flatten(0, 1).permute(0, 3, 1, 2)
    detector = registry.open_detector("efficientnet-lite0")
    batches = samplers.generated_batches(Noise(), {ClipShape(1): 9}, range(9), 0, 3)
    fake = torch.cat([detector.features(made.clips[ClipShape(1)][:, :, 0]) for made in batches])
    expected = frechet_distance_from_features(detector.features(frames), fake)
    assert together[1]["results"]["fd9_efflite0"] == pytest.approx(expected, rel=1e-5)


def test_fewer_clips_come_from_the_cache_of_more_and_more_extend_it(own_cache: Path):
    real, fake = side(moving_pictures(9, 5)), side(moving_pictures(9, 5, first=20))
    told: list[tuple[str, int, int]] = []

    def values(num_items: int, **options: Any) -> dict[str, float]:
        told.clear()
        options["progress"] = lambda *report: told.append(report)
        (result,) = metric_main.calc_metrics([f"fmd{num_items}_4f"], real, fake, **options)
        return result["results"]

    values(5)
    assert {total for _, _, total in told} == {5}
    seven = values(7)
    assert {total for _, _, total in told} == {2}, "two more a side"
    values(4)
    assert not told
    assert values(7) == seven
    assert values(7, replace_cache=True) == pytest.approx(seven, rel=1e-5)


def test_features_too_many_to_keep_give_the_same(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    real, fake = side(moving_pictures(9, 5)), Generated(Noise())
    (kept,) = metric_main.calc_metrics(["fmd8_4f"], real, fake)
    monkeypatch.setattr(extraction, "KEEP_BYTES", 7 * 224 * 4 - 1)
    (summed,) = metric_main.calc_metrics(["fmd8_4f"], real, fake, replace_cache=True)
    (stored,) = metric_main.calc_metrics(["fmd8_4f"], real, fake)
    for result in (summed, stored):
        assert result["results"] == pytest.approx(kept["results"], rel=1e-4)
        assert result["floors"] == pytest.approx(kept["floors"], rel=1e-4)
        assert result["errors"] == pytest.approx(kept["errors"], rel=1e-3)
    (fewer,) = metric_main.calc_metrics(["fmd7_4f"], real, fake)
    (alone,) = metric_main.calc_metrics(["fmd7_4f"], real, fake, replace_cache=True)
    assert fewer["results"] == pytest.approx(alone["results"], rel=1e-4), "sums of eight say nothing of seven"


def test_frames_count_by_the_length_of_their_video(own_cache: Path):
    """As published every video counts alike, under stylegan_v every frame."""
    long, short = moving_pictures(1, 12)[0], moving_pictures(3, 3, first=5)
    arrays = inputs.Arrays([long, *short], "uneven")
    real = inputs.Videos(arrays, SIZE, "array")
    fake = side(moving_pictures(5, 3, first=30))
    results = {
        protocol: metric_main.calc_metrics(["fd5_efflite0"], real, fake, protocol=protocol)[0]
        for protocol in ("lvg", "stylegan_v")
    }
    detector = registry.open_detector("efficientnet-lite0")
    frames = torch.cat([torch.from_numpy(video) for video in arrays.videos]).permute(0, 3, 1, 2)
    x = detector.features(frames)
    chosen = samplers.sorted_windows(fake.footage, "metric-fake-clip", 0, 5, 1, is_at_start=True)
    firsts = np.stack([fake.footage.read(window.clip, SIZE, [0])[0] for window in chosen])
    y = detector.features(torch.from_numpy(firsts).permute(0, 3, 1, 2))
    found = results["stylegan_v"]["results"]["fd5_efflite0"]
    assert found == pytest.approx(frechet_distance_from_features(x, y), rel=1e-4)
    windows = samplers.shuffled_windows(fake.footage, "metric-fake-clip", 0, 5, 1)
    some = np.stack([fake.footage.read(window.clip, SIZE, [window.start])[0] for window in windows])
    y = detector.features(torch.from_numpy(some).permute(0, 3, 1, 2))
    weights = np.repeat([1 / 12, *[1 / 3] * 3], [12, 3, 3, 3])
    found = results["lvg"]["results"]["fd5_efflite0"]
    assert found == pytest.approx(frechet_distance_from_features(x, y, weights), rel=1e-4)
    assert [results[p]["protocol"]["name"] for p in results] == ["lvg", "stylegan_v"]


@pytest.mark.slow
def test_kernel_distance_is_that_of_the_features_with_error_and_floor(own_cache: Path):
    real, fake = moving_pictures(6, 9), moving_pictures(6, 9, first=40)
    names = ["kvd6_9f", "fvd6_9f"]
    kvd, fvd = metric_main.calc_metrics(names, side(real), side(fake), protocol="stylegan_v")
    detector = registry.open_detector("i3d-kinetics-400")
    x, y = (detector.features(torch.from_numpy(videos).permute(0, 4, 1, 2, 3)).numpy() for videos in (real, fake))
    assert kvd["results"]["kvd6_9f"] == pytest.approx(kernel.polynomial_distance(x, y), rel=1e-4)
    assert fvd["results"]["fvd6_9f"] == pytest.approx(frechet_distance_from_features(x, y), rel=1e-4)
    floor = kernel.polynomial_distance(x[0::2], x[1::2])
    assert kvd["floors"]["kvd6_9f"] == pytest.approx(floor, rel=1e-4)
    left_out = np.array([kernel.polynomial_distance(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(6)])
    error = np.sqrt(5 / 6 * np.square(left_out - left_out.mean()).sum())
    assert kvd["errors"]["kvd6_9f"] == pytest.approx(error, rel=1e-3)


def test_tats_divides_covariances_by_one_less_and_the_same_footage_is_noticed(own_cache: Path):
    videos = side(moving_pictures(6, 4))
    biased, unbiased = (metric_main.calc_metrics(["fmd6_4f"], videos, videos, protocol=p)[0] for p in ("lvg", "tats"))
    # Clips of whole videos are the same on both sides, in another order.
    assert biased["results"]["fmd6_4f"] == pytest.approx(0, abs=1e-6)
    assert unbiased["floors"]["fmd6_4f"] > biased["floors"]["fmd6_4f"]
    assert unbiased["protocol"]["covariance"].startswith("unbiased")
    assert "both sides are the same footage" in " ".join(unbiased["warnings"])


def test_sides_that_do_not_fit_are_refused(own_cache: Path):
    small, large = side(moving_pictures(4, 4), "small"), side(moving_pictures(4, 4, scale=2), "large")
    with pytest.raises(ValueError, match="frames of small are 16x24, those of large 32x48: measure at one size"):
        metric_main.calc_metrics(["fmd4_4f"], small, large)
    with pytest.raises(ValueError, match="no pixel of dim .* saved from values in"):
        metric_main.calc_metrics(["fmd4_4f"], small, side(moving_pictures(4, 4) // 128, "dim"))


def test_exchanged_colours_are_suspected(own_cache: Path):
    videos = moving_pictures(10, 3)
    videos[..., 0] = videos[..., 0] // 4 + 150
    videos[..., 2] = videos[..., 2] // 4 + 20
    (result,) = metric_main.calc_metrics(["fmd10_3f"], side(videos), side(videos[::-1, ..., ::-1]))
    assert any("red and blue seem to be exchanged" in warning for warning in result["warnings"])


def test_fvd_between_takes_arrays_and_iterators():
    black, white = np.zeros((1, 10, 16, 16, 3), np.uint8), np.full((2, 10, 16, 16, 3), 255, np.uint8)
    result = metric_main.fvd_between(black, iter(white))
    assert result["fvd"] == pytest.approx(569.771, abs=2e-3)
    assert (result["num_a"], result["num_b"]) == (1, 2)
    assert "FVD was measured on 1 clips" in result["warning"]


class Doubled(Sampler):
    """Enlarges by repeating pixels, and needs two frames of context on either side."""

    outputs, needs = {"video": SIZE}, Needs(2, 2, (8, 12), follows=True)

    def video(self, request: Request) -> Iterator[Tensor]:
        assert request.num_frames is not None
        count = request.num_frames + 4
        video = request.prompt.frames([first - 2 for first in request.starts], count, (8, 12))[:, :, 2:-2]
        video = video.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        yield (video * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def test_frames_of_an_enlarger_are_of_all_windows_once_weighted(tmp_path: Path, own_cache: Path):
    """As published: each window of footage is the prompt of a frame, which counts 1 / windows of its clip."""
    for size in (SIZE, (8, 12)):
        write_dataset(tmp_path / "data", size, {"a/long": 13, "a/short": 6, "b/middle": 9})
    both = ClipDataset(tmp_path / "data", [SIZE, (8, 12)])
    fake = Generated(Doubled(), inputs.Videos(both, (8, 12), "dataset"))
    real = side(moving_pictures(6, 5))
    lvg, alike = (
        metric_main.calc_metrics(["fd100_efflite0", "fd8_efflite0"], real, fake, protocol=protocol)
        for protocol in ("lvg", "stylegan_v")
    )
    lengths = [clip.num_frames for clip in both.clips]
    counts = [length - 4 for length in lengths]
    assert [line["num_fake"] for line in lvg] == [sum(counts), 8] and sum(counts) < 100
    assert "once each, weighted 1 / windows of its video" in lvg[0]["protocol"]["policy_fake"]
    frames = [both.read(number, (8, 12), range(2, length - 2)) for number, length in enumerate(lengths)]
    images = torch.from_numpy(np.concatenate(frames).repeat(2, axis=1).repeat(2, axis=2)).permute(0, 3, 1, 2)
    detector = registry.open_detector("efficientnet-lite0")
    x = detector.features(torch.from_numpy(moving_pictures(6, 5)).flatten(0, 1).permute(0, 3, 1, 2))
    y = detector.features(images)
    weights = np.repeat([1 / count for count in counts], counts)
    expected = frechet_distance_from_features(x, y, None, weights)
    assert lvg[0]["results"]["fd100_efflite0"] == pytest.approx(expected, rel=1e-4)
    expected = frechet_distance_from_features(x, y)
    assert alike[0]["results"]["fd100_efflite0"] == pytest.approx(expected, rel=1e-4)


def test_long_videos_and_clips_come_from_one_pass(own_cache: Path):
    """What is said of long videos is what the library says of the same; clips have the values they have alone."""
    asked = []

    class Asked(Noise):
        def video(self, request: Request) -> Iterator[Tensor]:
            asked.extend(request.seeds)
            return super().video(request)

    told = []
    real = side(moving_pictures(4, 30))
    names = ["color_similarity", "fmd6_4f", "motion_energy_w1"]
    fake, tell = Generated(Asked()), lambda *report: told.append(report)
    lines = metric_main.calc_metrics(names, real, fake, num_videos=5, num_frames=12, progress=tell)
    assert len(asked) == len(set(asked)) == 6, "each video was generated once"
    assert [line["metric"] for line in lines] == names
    last = {label: report for label, *report in told}
    assert last == {"real": [6, 6], "long real": [5, 5], "long generated": [5, 5], "generated": [1, 1]}
    (alone,) = metric_main.calc_metrics(["fmd6_4f"], real, Generated(Noise()))
    assert lines[1]["results"] == pytest.approx(alone["results"], rel=1e-5)
    sides = (
        long_video.real_videos(real.footage, SIZE, 5, 12),
        long_video.generated_videos(Noise(), 5, 12),
    )
    expected = long_video.measure([names[0], names[2]], *sides)
    for line in (lines[0], lines[2]):
        assert line["results"] == pytest.approx(expected[line["metric"]]["results"])
        assert line["protocol"]["policy_fake"] == "from frame 0 on" and line["protocol"]["num_frames"] == 12
        assert line["versions"]["torch"] and line["real"]["id"] == real.content and line["total_time"] > 0
        assert line["num_real"] == line["num_fake"] == 5 and line["seed"] == 0
        assert line["protocol"]["name"] == "lvg" and line["protocol"]["height"] == SIZE[0]
    # Five windows of four videos: their errors know of no more than four.
    errors = [line["motion_energy_w1"]["errors"] for line in ({names[2]: lines[2]}, expected)]
    assert errors[0]["motion_energy_ratio"] != pytest.approx(errors[1]["motion_energy_ratio"], rel=1e-3)


SOURCE = """
import json, sys, time
import numpy as np, torch
from dnnlib import util
from metrics import inputs, metric_main
from metrics.plan import Generated
from torch_utils import distributed
from training.sampling import Sampler
util.set_cache_dir(sys.argv[2])
device = distributed.init("cpu")
real = inputs.open_videos(f"{sys.argv[1]}/real.npz")

class Waves(Sampler):
    period, outputs = 4, {"video": (16, 24)}

    def video(self, request):
        starts = torch.as_tensor(request.starts)
        t = (starts[:, None] + torch.arange(request.num_frames))[:, :, None, None, None]
        phase = torch.tensor(request.seeds)[:, None, None, None, None] % 97
        x, y, c = torch.arange(24)[:, None], torch.arange(16)[:, None, None], torch.arange(3)
        waves = torch.sin((x * (1 + phase % 5) + y + t) / 4.0 + c * phase)
        yield (waves * 100 + 128).to(torch.uint8)
"""

RANKS = (
    SOURCE
    + """
fake = inputs.open_videos(f"{sys.argv[1]}/fake.npz")
options = {"device": device, "batch": 2, "num_videos": 5, "num_frames": 9}
results = metric_main.calc_metrics(["fmd5_4f", "fd7_efflite0"], real, fake, **options)
names = ["fmd3_4f", "color_similarity", "feature_similarity", "motion_energy_w1"]
results += metric_main.calc_metrics(names, real, Generated(Waves()), **options)
if distributed.is_main():
    print(json.dumps([{**result["results"], **result["errors"]} for result in results]))
distributed.shutdown()
"""
)


def test_two_ranks_give_what_one_gives(own_cache: Path, tmp_path: Path):
    """Clips and long videos, of files and of a sampler."""
    np.savez(tmp_path / "real.npz", moving_pictures(6, 10))
    np.savez(tmp_path / "fake.npz", moving_pictures(6, 10, first=50))
    outputs = []
    for world_size in (1, 2):
        cache = tmp_path / f"cache{world_size}"
        cache.mkdir()
        (cache / "detectors").symlink_to(own_cache / "detectors")
        ranks = run_ranks(RANKS, tmp_path, cache, world_size=world_size, timeout=150)
        assert all(code == 0 for code, *_ in ranks), ranks
        outputs.append(json.loads(ranks[0][1].splitlines()[-1]))
    for one, two in zip(*outputs, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


FAILURE = (
    SOURCE
    + """
class Broken(Waves):
    def video(self, request):
        if distributed.get_rank() == 1:
            raise ValueError("this node lost its disk")
        time.sleep(0.2)
        yield from super().video(request)

extraction.ROUND_SEC = 1.0
begin = time.monotonic()
try:
    metric_main.calc_metrics(["fd100k_efflite0"], real, Generated(Broken()), device=device)
except distributed.SharedError as error:
    print(f"{time.monotonic() - begin:.1f} s: {error}")
distributed.shutdown()
"""
).replace("from metrics import inputs", "from metrics import extraction, inputs")


def test_what_fails_on_one_rank_ends_all_at_once(own_cache: Path, tmp_path: Path):
    """The other rank has hours of work before the next collective, and does not wait for it."""
    np.savez(tmp_path / "real.npz", moving_pictures(2, 3))
    ranks = run_ranks(FAILURE, tmp_path, own_cache, timeout=150)
    for rank, (code, output, errors) in enumerate(ranks):
        assert code == 0, errors
        seconds, _, message = output.splitlines()[-1].partition(" s: ")
        assert message == ("" if rank else "rank 1: ") + "this node lost its disk"
        assert float(seconds) < 60


def distort(videos: np.ndarray, kind: str, level: int) -> np.ndarray:
    """Three levels of what can be wrong with video."""
    rng = np.random.RandomState(level)
    if kind == "noise":
        noisy = videos + rng.standard_normal(videos.shape) * (4, 12, 36)[level]
        return noisy.round().clip(0, 255).astype(np.uint8)
    if kind == "blur":
        blur = ImageFilter.GaussianBlur((1.5, 4, 10)[level])
        return np.stack([[np.asarray(Image.fromarray(f).filter(blur)) for f in video] for video in videos])
    length = videos.shape[1]
    if kind == "shuffle":
        group = (2, 4, 8)[level]
        orders = [np.concatenate([first + rng.permutation(group) for first in range(0, length, group)]) for _ in videos]
        return np.stack([video[order] for video, order in zip(videos, orders, strict=True)])
    frozen = (2, 4, 7)[level]
    return videos[:, np.minimum(np.arange(length), length - 1 - frozen)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "blur", "shuffle", "freeze"])
def test_the_worse_the_video_the_larger_the_distance(kind: str, own_cache: Path):
    videos = moving_pictures(32, 8, scale=3)
    detector = registry.open_detector("efficientnet-lite0-motion")

    def features(clips: np.ndarray) -> Tensor:
        return detector.features(torch.from_numpy(clips).permute(0, 4, 1, 2, 3))

    real, clean = features(videos[:16]), features(videos[16:])
    ladder = [frechet_distance_from_features(real, clean)]
    for level in range(3):
        ladder.append(frechet_distance_from_features(real, features(distort(videos[16:], kind, level))))
    assert ladder == sorted(ladder), f"{kind}: {ladder}"
    assert ladder[-1] > 1.5 * ladder[0]
