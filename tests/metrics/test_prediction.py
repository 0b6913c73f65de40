"""A sampler that continues real videos: its context frames and actions, and the real frames for comparison."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import inputs, metric_main, samplers
from metrics.detectors import registry
from metrics.plan import Generated
from metrics.protocols import PROTOCOLS, EvalProtocol
from training.contract import System
from training.data.dataset import ClipDataset
from training.sampling import Needs, Request, Sampler

SIZE, LENGTHS = (2, 2), (14, 9, 21)


class Actions:
    """Action t of clip n is 100 n + t."""

    def read(self, clip: int, start: int, count: int) -> np.ndarray:
        assert 0 <= start and start + count <= LENGTHS[clip]
        return 100 * clip + np.arange(start, start + count)


class Colours:
    """Stands in for the feature network: features (N, 3 T) are the colours of the frames."""

    identity = {"name": "colours", "sha256": "0"}

    def features(self, clips: Tensor) -> Tensor:
        return clips.float().mean(dim=(-2, -1)).flatten(1)


class Footage(inputs.Arrays):
    """Videos whose red is the number of the video and whose green is the frame; actions are both in one number."""

    def __init__(self) -> None:
        videos = [np.zeros((length, *SIZE, 3), np.uint8) for length in LENGTHS]
        for number, video in enumerate(videos):
            video[..., 0], video[..., 1], video[..., 2] = number, np.arange(len(video))[:, None, None], 200
        super().__init__(videos, "rooms")
        self.streams = {"actions": Actions()}


class Predictor(Sampler):
    """Continues its prompt: red stays, green is the action modulo 100, so that frames are right if actions are."""

    outputs, random_access, period = {"video": SIZE}, False, 4
    needs = Needs(past=3, size=SIZE, streams=("actions",))

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor, int]] = []

    def video(self, request: Request) -> Iterator[Tensor]:
        assert request.starts == [0] * len(request.seeds) and request.num_frames is not None
        count = request.num_frames
        past = ((request.prompt.frames(-3, 3, SIZE) + 1) * 127.5).round()[:, :, :, 0, 0]
        actions = request.prompt.stream("actions", -3, 3 + count)
        self.given += [(frames, values, count) for frames, values in zip(past, actions, strict=True)]
        video = torch.full((len(request.seeds), count, *SIZE, 3), 200, dtype=torch.uint8)
        video[..., 0] = past[:, 0, -1:, None, None].expand(-1, count, *SIZE).byte()
        video[..., 1] = (actions[:, 3:] % 100)[:, :, None, None].expand(-1, -1, *SIZE).byte()
        yield from video.split([1, count - 1], dim=1)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Callable[..., tuple[list[dict[str, Any]], Predictor]]:
    """Measure the predictor against its footage, with colours as features."""
    monkeypatch.setattr(registry, "open_detector", lambda *_: Colours())
    footage = Footage()
    real = inputs.Videos(footage, SIZE, "array")

    def run(*names: str, rules: EvalProtocol = PROTOCOLS["lvg"], **options: Any) -> Any:
        predictor = Predictor()
        side = metric_main.prompted(predictor, real, "predictor.pkl")
        return metric_main.calc_metrics(names, real, side, protocol=rules, **options), predictor

    return run


def test_a_predictor_is_given_the_right_frames_and_actions(measure):
    (result,), predictor = measure("fmd6_4f")
    windows = samplers.shuffled_windows(Footage(), "metric-condition", 0, 6, 7)
    assert len(predictor.given) == 6
    for (clip, start), (frames, actions, count) in zip(windows, predictor.given, strict=True):
        assert count == 4, "the number of frames that the metric compares"
        assert frames.tolist() == [[clip] * 3, [start, start + 1, start + 2], [200] * 3]
        assert actions.tolist() == [100 * clip + start + t for t in range(7)]
    assert result["protocol"]["context"] == 3 and result["protocol"]["horizon"] == 4
    assert result["protocol"]["policy_real"].startswith("the continuations of the context frames")
    assert result["protocol"]["policy_fake"].startswith("conditioned on random windows of real clips")
    assert result["fake"]["condition"]["name"] == "rooms" and (result["num_real"], result["num_fake"]) == (6, 6)


@pytest.mark.parametrize(("context", "horizon"), [(None, None), (5, None), (None, 6), (4, 5)])
def test_a_perfect_prediction_has_distance_0(measure, context: int | None, horizon: int | None):
    """Each predicted clip equals the real one that it is compared with, on any protocol, also as a long video."""
    names = ("fmd5_4f", "fmd7_3f", "color_similarity", "motion_energy_w1")
    for name in ("lvg", "stylegan_v"):
        rules = dataclasses.replace(PROTOCOLS[name], context=context, horizon=horizon)
        results, predictor = measure(*names, rules=rules, num_videos=4, num_frames=5)
        for metric, result in zip(names, results, strict=True):
            assert result["protocol"]["context"] == (context or 3)
            values = [result["results"][key] for key in result["results"] if not key.endswith(("_jk", "_ratio"))]
            assert values == pytest.approx([0] * len(values), abs=1e-6), metric
        firsts = {int(frames[1, 0]) for frames, _, _ in predictor.given}
        assert min(firsts) >= (context or 3) - 3, "context frames beyond those needed come before"
    if horizon is not None:
        clips = {(int(frames[0, 0]), int(frames[1, 0])) for frames, _, _ in predictor.given}
        assert len(predictor.given) == 7 and len(clips) <= 7, "metrics of one horizon share their videos"


def test_values_do_not_depend_on_batch_or_other_metrics(measure):
    (alone,), _ = measure("fmd5_4f", batch=1, seed=3)
    (first, *_), _ = measure("fmd5_4f", "fmd6_3f", "color_similarity", num_videos=3, num_frames=6, seed=3)
    (again,), _ = measure("fmd5_4f", replace_cache=True, seed=3)
    assert alone["results"] == first["results"] == again["results"]
    assert alone["floors"] == first["floors"]


def test_what_does_not_fit_is_refused(measure):
    def with_rules(**changes: int) -> EvalProtocol:
        return dataclasses.replace(PROTOCOLS["lvg"], **changes)

    for rules, message in (
        (with_rules(context=2), "the model needs 3 context frames, and 2 are given"),
        (with_rules(horizon=3), "4 generated frames are compared, and the horizon is 3"),
        (with_rules(context=19), "rooms has no clip of 23 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            measure("fmd4_4f", rules=rules)
    real = inputs.Videos(Footage(), SIZE, "array")
    with pytest.raises(ValueError, match="are for models that need real frames"):
        metric_main.calc_metrics(["fmd4_4f"], real, real, protocol=with_rules(context=3))
    with pytest.raises(ValueError, match="generated side needs context frames"):
        metric_main.calc_metrics(["fmd4_4f"], real, Generated(Predictor()))
    del real.footage.streams  # pyright: ignore[reportAttributeAccessIssue]
    side = metric_main.prompted(Predictor(), real, "predictor.pkl")
    with pytest.raises(ValueError, match="needs the stream 'actions', which rooms does not have"):
        metric_main.calc_metrics(["fmd4_4f"], real, side)
    large = Predictor()
    large.outputs = {"video": (4, 4)}
    with pytest.raises(ValueError, match="predictor.pkl needs context frames of 2x2 for frames of 4x4, which rooms"):
        metric_main.prompted(large, real, "predictor.pkl")


class Trained(System):
    """A system in training whose sampler enlarges frames of 8x12."""

    def __init__(self) -> None:
        pass

    def sampler(self) -> Sampler:
        class Enlarger(Sampler):
            outputs, needs = {"video": (16, 24)}, Needs(1, 1, (8, 12), follows=True)

            def video(self, request: Request) -> Iterator[Tensor]:
                assert request.num_frames is not None
                frames = request.prompt.frames(request.starts, request.num_frames, (8, 12))
                video = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)
                yield video.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

        return Enlarger()


def test_a_system_in_training_is_measured_against_its_dataset(
    dataset_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(registry, "open_detector", lambda *_: Colours())
    measure = metric_main.training_metrics(str(dataset_path), 0, "cpu")
    results = measure(["fmd4_3f"], Trained())
    both = ClipDataset(dataset_path, [(16, 24), (8, 12)])
    real = inputs.Videos(ClipDataset(dataset_path, [(16, 24)]), (16, 24), "dataset")
    side = Generated(Trained().sampler(), inputs.Videos(both, (8, 12), "dataset"))
    (expected,) = metric_main.calc_metrics(["fmd4_3f"], real, side)
    assert results[0]["results"] == expected["results"]
    assert results[0]["fake"]["condition"]["id"] == expected["fake"]["condition"]["id"]
