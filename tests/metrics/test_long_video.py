"""Metrics of long videos: closed forms, inserted faults, and independence of the chunks."""

import functools
import json
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metrics import inputs, long_video, metric_main
from metrics.detectors import registry
from metrics.long_video import MEASURES, ProbeOptions, measure
from metrics.long_video_base import Rows, jackknife_error, jackknife_variance, slope_per_100
from metrics.long_video_features import SimilarityProbe, WindowProbe
from metrics.long_video_loops import ThumbnailProbe, area_mean
from metrics.long_video_pixels import ChangeProbe, ColourProbe, clip_energies, seam_scan
from training.data.dataset import ClipDataset
from training.random import random_state
from training.sampling import Request, Sampler

SIZE = (18, 24)
PIXEL_MEASURES = ("color_similarity", "motion_energy_w1", "seam_ratio", "loop_rate")


@functools.cache
def wander(item: int, num_frames: int) -> np.ndarray:
    """Return a view that drifts over a smooth texture and never comes back the same way: uint8 (T, H, W, 3)."""
    draws = random_state("texture", 0, item)
    coarse = draws.randint(256, size=(24, 24, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((200, 200), Image.Resampling.BICUBIC))
    velocity = np.cumsum(draws.standard_normal((num_frames, 2)) * 0.3, axis=0)
    place = np.cumsum(2 * velocity / (1 + np.linalg.norm(velocity, axis=1, keepdims=True)), axis=0).astype(int) % 200
    rows, columns = (place[:, [axis]] + np.arange(SIZE[axis]) for axis in (0, 1))
    return texture[rows[:, :, None] % 200, columns[:, None] % 200]


def noisy(video: np.ndarray, item: int, strength: float = 6.0) -> np.ndarray:
    noise = strength * random_state("noise", 0, item).standard_normal(video.shape)
    return (video + noise).clip(0, 255).astype(np.uint8)


def videos(num_videos: int, num_frames: int, first: int = 0) -> np.ndarray:
    """uint8 (N, T, H, W, 3)."""
    return np.stack([noisy(wander(item, num_frames), item) for item in range(first, first + num_videos)])


def flat(*colours: Sequence[int]) -> np.ndarray:
    """Return one video of frames of a single colour each: (1, T, H, W, 3)."""
    return np.broadcast_to(np.array(colours, np.uint8)[None, :, None, None], (1, len(colours), *SIZE, 3))


def in_chunks(video: np.ndarray, cuts: Iterable[int]) -> list[np.ndarray]:
    return np.split(video, sorted(cuts), axis=1)


def rows_of(probe: Any, chunks: Sequence[np.ndarray]) -> np.ndarray:
    for chunk in chunks:
        probe.add(chunk)
    return probe.finish()


class MeanColour:
    """Features that can be worked out by hand: the mean colour of an image, or of each clip's last and first frame."""

    identity = {"name": "mean-colour"}

    def features(self, video: torch.Tensor) -> torch.Tensor:
        means = video.double().mean(dim=(-2, -1))  # (N, 3) or (N, 3, T)
        return (means if means.ndim == 2 else torch.cat([means[:, :, 0], means[:, :, -1]], dim=1)).float()


OPTIONS = ProbeOptions(detector=MeanColour(), window=4, stride=2, lags=(1, 3))


# ----------------------------------------------------------------------------
# Colour similarity.


def test_colour_similarity_in_closed_form():
    red, green, nearly_red = (255, 0, 0), (0, 255, 0), (252, 3, 3)
    rows = rows_of(ColourProbe(OPTIONS, "real"), [flat(red, red, green, nearly_red)])
    assert rows.tolist() == [[1, 1, 0, 1]]  # 252 and 3 round to the end levels, whose bins are half as wide
    half = flat(red, red).copy()
    half[0, 1, : SIZE[0] // 2] = green
    assert rows_of(ColourProbe(OPTIONS, "real"), [half]).tolist() == [[1, 0.5]]


def test_colour_similarity_equals_an_intersection_of_histograms():
    video = random_state("colours", 0, 0).randint(256, size=(2, 5, 8, 9, 3), dtype=np.uint8) // 2
    bins = np.round(video / 255.0 * 19).astype(int)
    expected = np.zeros((2, 5))
    for n in range(2):
        first, *_ = np.histogramdd(bins[n, 0].reshape(-1, 3), bins=20, range=[(-0.5, 19.5)] * 3)
        for t in range(5):
            counts, *_ = np.histogramdd(bins[n, t].reshape(-1, 3), bins=20, range=[(-0.5, 19.5)] * 3)
            expected[n, t] = np.minimum(first, counts).sum() / 72
    assert np.allclose(rows_of(ColourProbe(OPTIONS, "real"), [video]), expected, rtol=0, atol=1e-15)


def test_the_colour_figure_is_mean_and_unbiased_deviation():
    real, fake = videos(6, 8), videos(4, 8, first=6)
    result = measure(["color_similarity"], [[real]], [[fake[:1]], [fake[1:]]], OPTIONS)["color_similarity"]
    rows = rows_of(ColourProbe(OPTIONS, "real"), [fake])
    generated, reference = result["curves"][0]["lines"]
    assert generated["x"] == list(range(8)) and generated["y"][0] == 1 and generated["band"][0] == 0
    assert np.allclose(generated["y"], rows.mean(axis=0))
    assert np.allclose(generated["band"], rows.std(axis=0, ddof=1))
    gap = np.abs(np.subtract(generated["y"], reference["y"]))[1:].mean()
    assert result["results"]["color_similarity_gap"] == pytest.approx(gap)
    assert result["errors"]["color_similarity_gap"] > 0 and (result["num_real"], result["num_fake"]) == (6, 4)


# ----------------------------------------------------------------------------
# Motion energy.


def test_motion_energy_distance_in_closed_form():
    def bright(steps: Sequence[int]) -> np.ndarray:
        return np.concatenate([flat(*[(step * t, step * t, step * t) for t in range(9)]) for step in steps])

    result = MEASURES["motion_energy_w1"]([[bright([1, 3, 5, 7])]], [[bright([8, 6, 4, 2])]], OPTIONS)
    assert result["results"] == pytest.approx({"motion_energy_w1": 1.0, "motion_energy_ratio": 1.25})
    same = MEASURES["motion_energy_w1"]([[bright([1, 3])]], [[bright([3, 1])]], OPTIONS)
    assert same["results"]["motion_energy_w1"] == 0


def test_clips_do_not_overlap_and_the_cut_between_them_does_not_count():
    changes = np.arange(1.0, 12.0)[None]  # of 12 frames: two clips of 5, whose changes are 1..4 and 6..9
    assert clip_energies(changes, 5).tolist() == [[2.5, 7.5]]
    assert clip_energies(changes, 40).tolist() == [[6.0]]


def test_motion_energy_and_its_curve_in_closed_form():
    grey = lambda *levels: flat(*[(level, level, level) for level in levels])  # noqa: E731
    real, fake = [[grey(0, 1, 2, 3)], [grey(0, 3, 6, 9)]], [[grey(10, 12, 15, 15)], [grey(10, 10, 11, 15)]]
    result = MEASURES["motion_energy"](real, fake, OPTIONS)
    assert result["results"] == pytest.approx({"motion_energy": (2 + 3 + 0 + 0 + 1 + 4) / 6})
    assert result["floors"]["motion_energy"] == 2 and result["errors"]["motion_energy"] == pytest.approx(0)
    generated, reference = result["curves"][0]["lines"]
    assert generated["x"] == [1, 2, 3] and generated["y"] == [1, 2, 2] and reference["y"] == [2, 2, 2]


def test_flat_frames_are_counted_by_each_channel():
    lively = np.zeros((1, 1, *SIZE, 3), np.uint8)
    lively[:, :, ::2, :, 1] = 17  # green alone, of a standard deviation of 8.5
    calm = lively * 15 // 17  # of 7.5
    fake = np.concatenate([lively, calm, flat((9, 200, 30)), lively], axis=1)
    result = MEASURES["flat_frames"](
        [[lively, lively], [lively, calm]], [[fake], [np.concatenate([calm] * 4, 1)]], OPTIONS
    )
    assert result["results"] == {"flat_frames": 0.75} and result["floors"] == {"flat_frames": 0.25}
    assert result["curves"][0]["lines"][0]["y"] == [0.5, 1, 1, 0.5] and result["curves"][0]["lines"][0]["x"][0] == 0
    assert (
        result["errors"]["flat_frames"] == pytest.approx(0.25) and "below 8 grey levels" in result["protocol"]["flat"]
    )


# ----------------------------------------------------------------------------
# Seams.


@pytest.mark.parametrize("period,phase", [(8, 0), (8, 3), (13, 5), (32, 31)])
def test_a_jump_at_each_join_is_found(period, phase):
    seen = videos(4, 140)
    other = (seen.astype(int) + 20).clip(0, 255).astype(np.uint8)
    odd = ((np.arange(140) - phase) // period) % 2 == 1
    jumping = np.where(odd[None, :, None, None, None], other, seen)
    result = MEASURES["seam_ratio"]([[videos(4, 140, first=4)]], [[jumping]])
    assert result["facts"] == {"seam_period": period, "seam_phase": phase}
    assert result["results"]["seam_ratio"] > 1.3 and result["errors"]["seam_ratio"] < 0.3
    assert result["results"]["seam_score"] > result["floors"]["seam_score"]


def test_a_repeated_frame_at_each_join_is_found():
    frames = np.arange(100)
    result = MEASURES["seam_ratio"]([[videos(2, 100)]], [[videos(2, 120)[:, frames - frames // 10]]])
    assert result["facts"]["seam_period"] == 10 and result["results"]["seam_ratio"] == 0


def test_seam_ratio_in_closed_form():
    changes = np.ones((3, 60))
    changes[:, 7::8] = 4  # into frames 8, 16, ...
    periods, phases, ratios, scores = seam_scan(changes)
    best = int(np.argmax(scores))
    assert (periods[best], phases[best]) == (8, 0) and ratios[best] == pytest.approx(4, rel=0.02)
    trend = seam_scan(np.linspace(1, 3, 200)[None] ** 2)
    assert np.allclose(trend[2], 1, atol=0.02)  # no seam, but a video that moves more and more


# ----------------------------------------------------------------------------
# Loops.


@pytest.mark.parametrize("period", [12, 30, 47])
def test_circles_are_found_with_their_period(period):
    for item in range(4):
        found = repeats(noisy(wander(item, 128)[np.arange(128) % period], item))
        assert found["circle_score"] > 0.9 and found["circle_period"] == period


def test_there_and_back_is_found_with_its_period():
    for item, period in enumerate((40, 60, 78)):
        path = np.abs((np.arange(150) + 11) % period - period // 2)
        found = repeats(noisy(wander(item, 100)[path], item))
        assert found["mirror_score"] > 0.9 and found["mirror_period"] == pytest.approx(period, abs=1)


def test_a_single_turn_is_found_without_a_period():
    found = repeats(noisy(wander(3, 100)[np.abs(np.arange(128) - 60)], 0))
    assert found["mirror_score"] > 0.9 and found["mirror_period"] == 0


def test_what_does_not_repeat_is_no_loop():
    for item in range(6):
        found = repeats(noisy(wander(item, 128), item))
        assert found["circle_score"] < 0.5 and found["mirror_score"] < 0.5
    frozen = np.repeat(wander(0, 1), 128, axis=0)
    assert repeats(frozen)["circle_score"] == 0 and repeats(frozen)["mirror_score"] == 0
    assert repeats(noisy(frozen, 0))["circle_score"] < 0.2


def repeats(video: np.ndarray) -> dict[str, float]:
    row = rows_of(ThumbnailProbe(OPTIONS, "real"), [video[None]])[0]
    return dict(zip(("circle_score", "circle_period", "mirror_score", "mirror_period"), row[:4].tolist(), strict=True))


def test_the_loop_rate_is_the_share_above_real_video():
    real, fake = videos(20, 96), videos(6, 96, first=20)
    fake[:3] = fake[:3, np.arange(96) % 24]
    result = MEASURES["loop_rate"]([[real]], [[fake]])
    assert result["results"]["loop_rate_circle"] >= 0.5 and "20 real videos" in result["warning"]
    circles = [entry for entry in result["repeating_videos"] if entry["kind"] == "circle"]
    assert [entry["video"] for entry in circles][:3] == [0, 1, 2]
    assert [entry["period"] for entry in circles][:3] == [24, 24, 24]
    json.dumps(result)


def test_thumbnails_average_areas():
    values = np.arange(36.0 * 64).reshape(36, 64)
    assert np.allclose(area_mean(values, 0, 9), values.reshape(9, 4, 64).mean(axis=1))
    assert np.allclose(area_mean(values[:10], 0, 4), [0.4 * (values[:10] * w[:, None]).sum(axis=0) for w in QUARTERS])


QUARTERS = np.array(
    [[1, 1, 0.5] + 7 * [0], [0, 0, 0.5, 1, 1] + 5 * [0], 5 * [0] + [1, 1, 0.5, 0, 0], 7 * [0] + [0.5, 1, 1]]
)


# ----------------------------------------------------------------------------
# Features.


def test_feature_similarity_is_the_mean_cosine_by_lag():
    video = videos(2, 12)
    means = video.mean(axis=(2, 3))
    means /= np.linalg.norm(means, axis=2, keepdims=True)
    expected = [[(m[lag:] * m[:-lag]).sum(axis=1).mean() for lag in (1, 3)] for m in means]
    assert np.allclose(rows_of(SimilarityProbe(OPTIONS, "real"), [video]), expected, atol=1e-6)
    still = MEASURES["feature_similarity"]([[video]], [[np.repeat(video[:, :1], 12, axis=1)]], OPTIONS)
    assert still["curves"][0]["lines"][0]["y"] == pytest.approx([1, 1])
    assert still["results"]["feature_similarity_gap"] == pytest.approx(1 - np.mean(expected), abs=1e-6)


def test_drift_is_recovered():
    """Video that gets brighter by 2 grey levels a frame: the Frechet distance is the square of what is added."""
    draws = random_state("drift", 0, 0)
    real = draws.randint(60, 140, size=(24, 4, 1, 1, 1)).repeat(3, axis=-1)
    start = real[:, :1] + np.zeros((1, 40, 1, 1, 1), int)
    fake = start + 2 * np.arange(40)[None, :, None, None, None]
    real = real[:, :1].repeat(4, axis=1)
    sides = [np.broadcast_to(x, (24, x.shape[1], *SIZE, 3)).astype(np.uint8) for x in (real, fake)]
    result = measure(["fvd_drift", "kvd_drift"], [[sides[0]]], [[sides[1]]], OPTIONS)
    first = np.arange(0, 38, 2)[:19]
    expected = 3 * (2.0 * first) ** 2 + 3 * (2.0 * (first + 3)) ** 2
    curve = result["fvd_drift"]["curves"][0]["lines"][0]
    assert curve["x"] == first.tolist() and np.allclose(curve["y"], expected, rtol=1e-4)
    slope = 100 * np.polyfit(first, expected, 1)[0]
    assert result["fvd_drift"]["results"]["fvd_drift_slope"] == pytest.approx(slope, rel=1e-4)
    assert result["fvd_drift"]["results"]["fvd_drift_last"] == pytest.approx(expected[-1], rel=1e-4)
    assert result["kvd_drift"]["results"]["kvd_drift_slope"] > 0
    assert result["kvd_drift"]["detector"] == MeanColour.identity
    assert "24 clips" in result["fvd_drift"]["warning"] and "warning" not in result["kvd_drift"]


def test_video_that_does_not_drift_has_no_slope():
    def draw(item: int, count: int) -> np.ndarray:
        level = random_state("steady", 0, item).randint(40, 200, size=(count, 20, 1, 1, 3))
        return np.broadcast_to(level, (count, 20, *SIZE, 3)).astype(np.uint8)

    result = MEASURES["kvd_drift"]([[draw(0, 24)]], [[draw(1, 24)]], OPTIONS)
    slope, error = (result[key]["kvd_drift_slope"] for key in ("results", "errors"))
    assert error > 0 and abs(slope) < 3 * error


# ----------------------------------------------------------------------------
# Errors.


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = random_state("jackknife", 0, 0).standard_normal(12)
    rows = Rows(values, np.arange(12))
    assert jackknife_variance(np.mean, rows) == pytest.approx(values.var(ddof=1) / 12)
    error = jackknife_error(lambda a, b: a.mean() - b.mean(), rows, Rows(values[:7], np.arange(7)))
    assert error == pytest.approx(np.sqrt(values.var(ddof=1) / 12 + values[:7].var(ddof=1) / 7))
    assert slope_per_100(np.array([0, 8, 16]), np.array([1.0, 1.4, 1.8])) == pytest.approx(5)


def test_windows_of_one_video_are_not_independent():
    """Each video three times says no more than each once; halves share no video, and one video alone has two still."""
    values = random_state("jackknife", 1, 0).standard_normal(10)
    thrice = Rows(np.repeat(values, 3), np.repeat(np.arange(10), 3))
    once = Rows(values, np.arange(10))
    assert jackknife_variance(np.mean, thrice) == pytest.approx(jackknife_variance(np.mean, once))
    assert not set(thrice.halves()[0]) & set(thrice.halves()[1])
    alone = Rows(values, np.zeros(10))
    assert [len(half) for half in alone.halves()] == [5, 5]
    assert jackknife_variance(np.mean, alone) == pytest.approx(values.var(ddof=1) / 10)


def test_what_cannot_be_measured_is_refused():
    good, short = [[videos(2, 64)]], [[videos(2, 20)]]
    refusals = [
        (["colour"], good, good, "'colour' is not a measure of long videos"),
        (["color_similarity"], good, short, "real ones have 64 and the generated ones 20"),
        (["color_similarity"], good, [[videos(1, 64)]], "1 generated videos"),
        (["color_similarity"], good, [], "0 generated videos"),
        (["color_similarity"], [*good, *short], good, "the real videos differ in length"),
        (["color_similarity"], good, [[videos(2, 64) / 255]], "holds float64 from 0 to 1"),
        (["color_similarity"], good, [[videos(2, 64)[:, :, 1:]]], "18x24, those of the generated ones 17x24"),
        (["loop_rate"], short, short, "at least 64"),
        (["seam_ratio"], good, [[videos(2, 5)]], "videos of 5 frames"),
        (["motion_energy_w1"], good, [[videos(2, 1)]], "videos of one frame"),
        (["fvd_drift"], good, [[videos(2, 7)]], "2 clips a video"),
        (["fvd_drift"], good, [[videos(2, 3)]], "shorter than a clip of 4 frames"),
        (["feature_similarity"], good, [[videos(2, 1)]], "no two frames"),
    ]
    for names, real, fake, message in refusals:
        with pytest.raises(ValueError, match=message):
            measure(names, real, fake, OPTIONS)


# ----------------------------------------------------------------------------
# Streams.


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(1, 63), max_size=6))
def test_any_chunking_gives_the_same(cuts):
    video = STREAMED
    for maker in (ColourProbe, ChangeProbe, ThumbnailProbe):
        whole, cut = (rows_of(maker(OPTIONS, "real"), chunks) for chunks in ([video], in_chunks(video, cuts)))
        assert np.array_equal(whole, cut)
    whole, cut = (rows_of(SimilarityProbe(OPTIONS, "real"), chunks) for chunks in ([video], in_chunks(video, cuts)))
    assert np.allclose(whole, cut, rtol=0, atol=1e-6)
    for side, num_clips in (("real", 1), ("generated", 31)):
        whole, cut = (
            rows_of(WindowProbe(OPTIONS, side, "unused"), chunks) for chunks in ([video], in_chunks(video, cuts))
        )
        assert np.array_equal(whole, cut) and whole.shape[1] == num_clips


STREAMED = videos(2, 64)


def test_strides_longer_than_a_clip_skip_frames():
    options = ProbeOptions(detector=MeanColour(), window=4, stride=7)
    rows = rows_of(WindowProbe(options, "generated", "unused"), in_chunks(STREAMED, [2, 6, 13]))
    expected = [STREAMED[:, start].mean(axis=(1, 2)) for start in range(0, 61, 7)]
    assert np.allclose(rows[:, :, :3], np.stack(expected, axis=1), atol=1e-4)


def test_one_pass_gives_what_each_measure_gives_alone():
    real, fake = videos(4, 70), videos(4, 70, first=4)
    together = measure(list(PIXEL_MEASURES), [[real[:3]], [real[3:]]], [iter(in_chunks(fake, [9]))])
    for name in PIXEL_MEASURES:
        assert together[name] == MEASURES[name]([[torch.from_numpy(real)]], [[fake[:1]], [fake[1:]]])


def test_memory_does_not_grow_with_the_video():
    def peak(num_chunks: int) -> int:
        def groups() -> Iterator[Iterator[np.ndarray]]:
            yield (videos_chunk() for _ in range(num_chunks))

        tracemalloc.start()
        measure([*PIXEL_MEASURES, "feature_similarity"], groups(), groups(), OPTIONS)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    def videos_chunk() -> np.ndarray:
        return np.zeros((2, 16, 72, 128, 3), np.uint8)

    peak(5)
    assert peak(25) - peak(5) < 2 * videos_chunk().nbytes  # forty chunks more on either side


# ----------------------------------------------------------------------------
# Sides.


def test_real_windows_are_what_the_dataset_holds(dataset_path: Path):
    dataset = ClipDataset(dataset_path, [(16, 24)])
    groups = [list(group) for group in long_video.real_videos(dataset, (16, 24), num_videos=5, num_frames=36, batch=2)]
    assert [[chunk.shape[:2] for chunk in group] for group in groups] == [[(n, 32), (n, 4)] for n in (2, 2, 1)]
    clip = dataset.read([c.path for c in dataset.clips].index("a/long"), (16, 24), range(40))
    for group in groups:
        for video in np.concatenate(group, axis=1):
            assert any(np.array_equal(video, clip[start : start + 36]) for start in range(5))
    again = long_video.real_videos(dataset, (16, 24), num_videos=5, num_frames=36, batch=5)
    assert np.array_equal(np.concatenate(list(next(again)), axis=1)[:2], np.concatenate(groups[0], axis=1))


def test_generated_videos_depend_on_seed_and_number_alone():
    class Seeds(Sampler):
        def video(self, request: Request) -> Iterator[Any]:
            assert request.start == 0 and request.num_frames == 3
            yield torch.tensor(request.seeds)[:, None].expand(-1, request.num_frames)

    draws = [
        np.concatenate([chunk for group in long_video.generated_videos(Seeds(), 6, 3, seed, batch) for chunk in group])
        for seed, batch in ((0, 1), (0, 4), (1, 4))
    ]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[1], draws[2])
    assert len(set(draws[0][:, 0].tolist())) == 6


def test_drift_needs_real_clips_alone(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Real videos may be shorter than the generated ones, and values do not depend on the other measures."""
    monkeypatch.setattr(registry, "open_detector", lambda *_: MeanColour())
    whole = videos(6, 40)
    arrays = {"short": whole[:, :20], "long": whole, "fake": videos(6, 40, first=6)}
    real, long, fake = (inputs.Videos(inputs.Arrays(x, name), SIZE, "array") for name, x in arrays.items())
    options: dict[str, Any] = {"num_videos": 6, "num_frames": 40}
    (alone,) = metric_main.calc_metrics(["fmd_drift"], real, fake, **options)
    assert alone["floors"].keys() == {"fmd_drift_first", "fmd_drift_last"} and alone["protocol"]["covariance"] == "N"
    assert len(alone["curves"][0]["lines"][0]["x"]) == 4
    both = metric_main.calc_metrics(["color_similarity", "fmd_drift"], long, fake, **options)
    (again,) = metric_main.calc_metrics(["fmd_drift"], long, fake, **options)
    assert both[1]["results"] == again["results"]
    (other,) = metric_main.calc_metrics(["fmd_drift"], real, fake, protocol="mebt-sliding", **options)
    assert other["results"]["fmd_drift_first"] > alone["results"]["fmd_drift_first"], "covariances are larger"
    with pytest.raises(ValueError, match="short has no clip of 40 frames"):
        metric_main.calc_metrics(["color_similarity"], real, fake, **options)
