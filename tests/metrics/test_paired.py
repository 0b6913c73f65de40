"""Clips compared with the real ones that they should equal: formulas, floors, the best of several, files of results."""

import dataclasses
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from metrics import extraction, inputs, metric_main, paired, samplers
from metrics.detectors import registry
from metrics.frechet import frechet_distance_from_features
from metrics.protocols import PROTOCOLS, EvalProtocol
from metrics.report import collect, report_text
from tests.ranks import run_ranks
from training.random import random_state
from training.sampling import Needs, Request, Sampler

SIZE = (32, 40)
LENGTHS = (14, 9, 21, 12)
NAMES = ("psnr6_4f", "ssim6_4f", "lpips6_4f", "lpips_vgg6_4f")


def footage() -> inputs.Videos:
    """Return videos of smooth noise that drifts."""
    videos = []
    for number, length in enumerate(LENGTHS):
        noise = random_state("test-paired", 0, number).random_sample((*SIZE, 3)) * 255
        smooth = ndimage.gaussian_filter(noise, (2, 2, 0), mode="wrap")
        smooth = (smooth - smooth.min()) / np.ptp(smooth) * 255
        videos.append(np.stack([np.roll(smooth, frame, axis=1) for frame in range(length)]).astype(np.uint8))
    return inputs.Videos(inputs.Arrays(videos, "drifting"), SIZE, "array")


class Tokenizer(Sampler):
    """Reconstructs its prompt with an error: values are multiples of `step`."""

    outputs = {"video": SIZE}
    needs = Needs(size=SIZE, follows=True)

    def __init__(self, step: int = 16) -> None:
        self.step = step

    def video(self, request: Request) -> Iterator[Tensor]:
        assert request.num_frames is not None
        frames = request.prompt.frames(request.starts, request.num_frames, SIZE)
        video = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)
        for piece in video.split(3, dim=1):
            yield piece // self.step * self.step


class Predictor(Sampler):
    """Continues its prompt by the last frame with noise of the seed, which grows with time."""

    outputs, random_access = {"video": SIZE}, False
    needs = Needs(past=2, size=SIZE)
    costs = {"function evaluations": 7}

    def video(self, request: Request) -> Iterator[Tensor]:
        assert request.num_frames is not None
        last = ((request.prompt.frames(-2, 2, SIZE)[:, :, -1] + 1) * 127.5).permute(0, 2, 3, 1)
        for frame in range(request.num_frames):
            noise = [random_state("test-noise", seed, 0).standard_normal((*SIZE, 3)) for seed in request.seeds]
            scale = [random_state("test-scale", seed, 0).random_sample() * 20 * (frame + 1) for seed in request.seeds]
            drift = torch.from_numpy(np.stack(noise) * np.array(scale)[:, None, None, None])
            yield (last + drift).round().clamp(0, 255).byte()[:, None]


def rules(**changes: Any) -> EvalProtocol:
    return dataclasses.replace(PROTOCOLS["lvg"], name="test", **changes)


def measure(sampler: Sampler, *names: str, protocol: EvalProtocol = PROTOCOLS["lvg"], **options: Any) -> Any:
    real = footage()
    side = metric_main.prompted(sampler, real, "a model")
    return metric_main.calc_metrics(names, real, side, protocol=protocol, **options)


# ----------------------------------------------------------------------------
# Formulas.


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Return the structural similarity of (H, W, 3) in [0, 1] by filters of SciPy, cut to the valid region."""

    def blur(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, (1.5, 1.5, 0), truncate=5 / 1.5)[5:-5, 5:-5]

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x**2) - mean_x**2, blur(y**2) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + 0.01**2) * (2 * both + 0.03**2)
    return float((top / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2))).mean())


def test_known_values():
    black, grey = torch.zeros(2, 3, 16, 12), torch.full((2, 3, 16, 12), 0.5)
    assert paired.psnr(black, grey).tolist() == pytest.approx([6.0206] * 2, abs=1e-4)
    assert paired.psnr(grey, grey).tolist() == [float("inf")] * 2
    # Of constant images only the term of the means is left: (2 x y + C1) / (x^2 + y^2 + C1).
    assert paired.ssim(black, grey).tolist() == pytest.approx([1e-4 / 0.2501] * 2, rel=1e-9)
    assert paired.ssim(grey, grey).tolist() == pytest.approx([1, 1], abs=1e-12)
    comparison = paired.open_comparison("psnr", "cpu")
    clips = torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8)
    other = clips.clone()
    other[0, 0, 1, 3, 4] = 1
    values = comparison.compare(clips, other)
    assert values.shape == (1, 2) and values[0, 0] == 100 and 70 < values[0, 1] < 100


@pytest.mark.parametrize("shape", [(11, 11), (13, 30), (40, 24)])
def test_similarity_is_that_of_filters_of_scipy(shape: tuple[int, int]):
    rng = np.random.RandomState(0)
    x = rng.random_sample((3, *shape, 3))
    y = np.clip(x + rng.standard_normal(x.shape) * [[[[0.01]]], [[[0.1]]], [[[0.5]]]], 0, 1)
    found = paired.ssim(*(torch.from_numpy(z).permute(0, 3, 1, 2) for z in (x, y)))
    assert found.tolist() == pytest.approx([reference_ssim(*pair) for pair in zip(x, y, strict=True)], abs=1e-9)


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="SSIM got images of 10x20, and needs 11 pixels per side"):
        paired.ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


# ----------------------------------------------------------------------------
# Tokenizers.


def test_a_reconstruction_is_compared_with_its_own_clip(own_cache: Path):
    results = measure(Tokenizer(), *NAMES, "fmd6_4f", "rfmd6_4f", "fd9_efflite0")
    assert [result["metric"] for result in results] == [*NAMES, "rfmd6_4f", "rfmd6_4f", "rfd9_efflite0"]
    real = footage()
    windows = samplers.shuffled_windows(real.footage, "metric-condition", 0, 6, 4)
    clips = np.stack([real.footage.read(w.clip, SIZE, range(w.start, w.start + 4)) for w in windows])
    made = clips // 16 * 16
    x, y = (torch.from_numpy(z / 255).permute(0, 1, 4, 2, 3).flatten(0, 1) for z in (clips, made))
    psnr, ssim = paired.psnr(x, y).view(6, 4), paired.ssim(x, y).view(6, 4)
    for result, values in zip(results, (psnr, ssim), strict=False):
        name = result["metric"]
        assert result["results"] == {name: pytest.approx(values.mean().item(), rel=1e-6)}
        (curve,) = result["curves"]
        lines = {line["label"]: line for line in curve["lines"]}
        assert lines["generated"]["y"] == pytest.approx(values.mean(dim=0).tolist(), rel=1e-6)
        assert lines["generated"]["x"] == [1, 2, 3, 4] and len(lines["generated"]["band"]) == 4
        assert result["floors"][name] < result["results"][name] and result["higher_is_better"]
        assert result["protocol"]["policy_real"].startswith("the clips that the generated side reconstructs")
    # Six clips of four videos: the error is that of leaving out each video.
    videos = np.array([window.clip for window in windows])
    means = psnr.mean(dim=1).numpy()
    left = np.array([means[videos != video].mean() for video in np.unique(videos)])
    error = np.sqrt((len(left) - 1) * left.var())
    assert results[0]["errors"]["psnr6_4f"] == pytest.approx(error, rel=1e-3)
    for result in results[2:4]:
        assert 0 < result["results"][result["metric"]] < result["floors"][result["metric"]]
        assert "higher_is_better" not in result and result["detector"]["verified"]
    assert json.loads(json.dumps(results)) == results


def test_a_perfect_reconstruction_has_no_error(own_cache: Path):
    psnr, ssim, lpips, rfmd = measure(Tokenizer(1), "psnr5_4f", "ssim5_4f", "lpips5_4f", "fmd5_4f")
    assert psnr["results"]["psnr5_4f"] == 100 and ssim["results"]["ssim5_4f"] == pytest.approx(1, abs=1e-6)
    assert lpips["results"]["lpips5_4f"] == pytest.approx(0, abs=1e-6)
    assert rfmd["results"]["rfmd5_4f"] == pytest.approx(0, abs=1e-6)
    assert rfmd["floors"]["rfmd5_4f"] > 0


def test_values_depend_neither_on_batch_nor_on_the_cache_nor_on_other_metrics(own_cache: Path):
    (alone,) = measure(Tokenizer(), "psnr6_4f", batch=1, seed=3)
    first, *_ = measure(Tokenizer(), "psnr6_4f", "ssim3_4f", "psnr4_2f", seed=3)
    (again,) = measure(Tokenizer(), "psnr6_4f", replace_cache=True, seed=3)
    for result in (first, again):
        for part in ("results", "errors", "floors"):
            assert result[part] == pytest.approx(alone[part], rel=1e-6)


# ----------------------------------------------------------------------------
# Predictors.


def test_predictions_have_floors_and_copies_of_the_last_frame(own_cache: Path):
    psnr, fmd = measure(Predictor(), "psnr6_5f", "fmd6_7f_context2", protocol=rules(context=3, horizon=6))
    real = footage()
    windows = samplers.shuffled_windows(real.footage, "metric-condition", 0, 6, 9, past=3)
    copies, values = [], []
    for clip, start in windows:
        frames = torch.from_numpy(real.footage.read(clip, SIZE, range(start - 1, start + 5)) / 255)
        values.append(paired.psnr(frames[1:], frames[:1].expand(5, -1, -1, -1)))
        copies.append(values[-1].mean().item())
    below = psnr["baselines"]["copy of the last frame"]
    assert below["psnr6_5f"] == pytest.approx(np.mean(copies), rel=1e-6)
    lines = {line["label"]: line["y"] for line in psnr["curves"][0]["lines"]}
    assert set(lines) == {"generated", "copy of the last frame", "real"}
    assert lines["copy of the last frame"] == pytest.approx(torch.stack(values).mean(dim=0).tolist(), rel=1e-6)
    assert psnr["floors"]["psnr6_5f"] < below["psnr6_5f"], "another clip is further away than the last frame"
    assert (fmd["protocol"]["context"], fmd["protocol"]["horizon"]) == (3, 6)
    assert (fmd["protocol"]["context_in_clips"], psnr["protocol"]["context_in_clips"]) == (2, 0)
    assert fmd["baselines"]["copy of the last frame"]["fmd6_7f_context2"] > 0
    assert fmd["fake"]["sampler"] == {"function evaluations": 7}
    table = report_text(collect({"run": [psnr, fmd]}))
    assert table.count("copy of the last frame") == 2


class Seen:
    """Stands in for a feature network, and keeps what it is given."""

    identity = {"name": "seen", "sha256": "0"}

    def __init__(self) -> None:
        self.clips: list[Tensor] = []

    def features(self, clips: Tensor) -> Tensor:
        self.clips += list(clips)
        return clips.float().mean(dim=(-2, -1)).flatten(1)


def test_context_frames_are_the_real_ones(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """They come before the predicted frames, and a perfect prediction has distance 0 with them too."""

    class Perfect(Predictor):
        def video(self, request: Request) -> Iterator[Tensor]:
            assert request.num_frames is not None
            prompt = request.prompt.frames(0, request.num_frames, SIZE)
            yield ((prompt + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)

    seen = Seen()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "open_detector", lambda *_: seen)
        measure(Predictor(), "fmd3_7f_context4", protocol=rules(context=4))
    real, still, made = seen.clips[:3], seen.clips[3:6], seen.clips[6:]
    for clips in zip(real, still, made, strict=True):
        assert (clips[1][:, :4] == clips[0][:, :4]).all() and (clips[2][:, :4] == clips[0][:, :4]).all()
        assert (clips[1][:, 4:] == clips[0][:, 3:4]).all() and (clips[1][:, 4:] != clips[0][:, 4:]).any()
        assert (clips[2][:, 4] != clips[1][:, 4]).any() and clips[2].shape[1] == 7
    same, psnr = measure(Perfect(), "fmd5_7f_context4", "psnr5_3f", protocol=rules(context=4))
    assert same["results"]["fmd5_7f_context4"] == pytest.approx(0, abs=1e-6)
    assert psnr["results"]["psnr5_3f"] == 100


def test_the_best_of_more_samples_is_no_worse(own_cache: Path):
    found = {}
    for samples in (1, 2, 5):
        psnr, lpips, fmd = measure(
            Predictor(), "psnr4_3f", "lpips4_3f", "fmd4_4f_context1", protocol=rules(samples=samples)
        )
        assert (psnr["num_real"], psnr["num_fake"]) == (4, 4 * samples) == (fmd["num_real"], fmd["num_fake"])
        assert psnr["protocol"]["samples"] == samples
        found[samples] = [line["results"] for line in (psnr, lpips)]
    assert list(found[1][0]) == ["psnr4_3f"] and list(found[5][0]) == ["psnr4_3f", "psnr4_3f_best5"]
    for samples in (2, 5):
        psnr, lpips = found[samples]
        assert psnr[f"psnr4_3f_best{samples}"] > psnr["psnr4_3f"]
        assert lpips[f"lpips4_3f_best{samples}"] < lpips["lpips4_3f"]
    # The number of samples is fixed by the protocol, so that the best of 5 may be another's; of all, it is the best.
    (many,) = measure(Predictor(), "psnr4_3f", protocol=rules(samples=5), batch=1)
    assert many["results"] == pytest.approx(found[5][0], rel=1e-6)


def test_distances_are_means_over_groups(own_cache: Path):
    (grouped,) = measure(Predictor(), "fmd6_4f", protocol=rules(group_size=3))
    assert set(grouped["results"]) == {"fmd6_4f", "fmd6_4f_std"}
    assert grouped["protocol"]["group_size"] == 3
    (one,) = measure(Predictor(), "fmd3_4f", protocol=rules(group_size=3))
    assert "fmd3_4f_std" not in one["results"]
    with pytest.raises(ValueError, match="fmd7_4f is a mean over groups of 3 clips: take a multiple of 3"):
        measure(Predictor(), "fmd7_4f", protocol=rules(group_size=3))


def test_first_windows_are_the_beginnings_of_videos(own_cache: Path):
    (result,) = measure(Predictor(), "psnr9_4f", protocol=rules(windows="first"))
    assert (result["num_real"], result["num_fake"]) == (4, 4)
    assert "first window of each real clip" in result["protocol"]["policy_fake"]


def test_what_does_not_fit_is_refused(own_cache: Path):
    for names, protocol, message in (
        (["fmd4_9f_context5"], rules(context=3), "5 context frames are compared, and 3 are given"),
        (["psnr4_4f"], PROTOCOLS["kth-10to30"], "drifting has no clip of 40 frames"),
        (["rfmd4_4f"], rules(), "rfmd4_4f is of reconstructions, which a tokenizer makes"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(Predictor(), *names, protocol=protocol)
    with pytest.raises(ValueError, match="2 samples a context are for models that continue videos"):
        measure(Tokenizer(), "psnr4_4f", protocol=rules(samples=2))
    with pytest.raises(ValueError, match="includes context frames, which only models that continue videos have"):
        measure(Tokenizer(), "fmd4_4f_context1")
    real = footage()
    with pytest.raises(ValueError, match="psnr4_4f compares each clip with the real one that it should equal"):
        metric_main.calc_metrics(["psnr4_4f"], real, real)


SCRIPT = """
import json, sys
from dnnlib import util
from torch_utils import distributed
from tests.metrics.test_paired import Predictor, measure, rules

util.set_cache_dir(sys.argv[1])
device = distributed.init("cpu")
results = measure(Predictor(), "psnr5_3f", "fmd4_4f_context1", protocol=rules(samples=3), device=device)
if distributed.is_main():
    print(json.dumps([{**result["results"], **result["errors"], **result["floors"]} for result in results]))
distributed.shutdown()
"""


def test_two_ranks_give_what_one_gives(own_cache: Path, tmp_path: Path):
    outputs = []
    for world_size in (1, 2):
        cache = tmp_path / f"cache{world_size}"
        cache.mkdir()
        (cache / "detectors").symlink_to(own_cache / "detectors")
        ranks = run_ranks(SCRIPT, cache, world_size=world_size, timeout=100)
        assert all(code == 0 for code, *_ in ranks), ranks
        outputs.append(json.loads(ranks[0][1].splitlines()[-1]))
    for one, two in zip(*outputs, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_frames_of_clips_are_compared_frame_by_frame(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Each frame of a clip counts as one, whether all features are kept or only their sums."""
    (kept,) = measure(Tokenizer(), "rfd6_4f_efflite0")
    real = footage()
    windows = samplers.shuffled_windows(real.footage, "metric-condition", 0, 6, 4)
    clips = np.concatenate([real.footage.read(w.clip, SIZE, range(w.start, w.start + 4)) for w in windows])
    detector = registry.open_detector("efficientnet-lite0")
    x, y = (detector.features(torch.from_numpy(z).permute(0, 3, 1, 2)) for z in (clips, clips // 16 * 16))
    assert kept["results"]["rfd6_4f_efflite0"] == pytest.approx(frechet_distance_from_features(x, y), rel=1e-4)
    assert (kept["num_real"], kept["num_fake"]) == (6, 6) and kept["errors"]["rfd6_4f_efflite0"] > 0
    monkeypatch.setattr(extraction, "KEEP_BYTES", 0)
    (summed,) = measure(Tokenizer(), "rfd6_4f_efflite0", replace_cache=True, batch=2)
    for part in ("results", "errors", "floors"):
        assert summed[part] == pytest.approx(kept[part], rel=1e-3)


def test_memory_does_not_grow_with_the_number_of_clips(own_cache: Path):
    """However many clips are compared, only those of the last few batches are held."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(Predictor):
        def video(self, request: Request) -> Iterator[Tensor]:
            nonlocal most
            for chunk in super().video(request):
                alive.append(weakref.ref(chunk))
                most = max(most, sum(one() is not None for one in alive))
                yield chunk

    counts = []
    for num_clips in (12, 60):
        most = 0
        (result,) = measure(Watched(), f"psnr{num_clips}_4f", batch=4, protocol=rules(samples=2))
        assert result["num_fake"] == 2 * num_clips
        counts.append(most)
    assert counts[1] <= counts[0] <= 4 * 3
