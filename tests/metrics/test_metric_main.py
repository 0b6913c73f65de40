"""Metrics by name: what names mean, and values that depend on the clips alone."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import metric_main
from metrics.samplers import ClipShape
from training.dataset import ClipDataset
from training.random import random_state

SIZE = (16, 24)


class Noise:
    """Noise that is a function of seed and frame, as a generator's video is."""

    temporal_scale, context = 4, 0

    def sample(self, seeds: Sequence[int], start, num_frames: int, condition=None) -> Iterator[Tensor]:
        for done in range(0, num_frames, 5):
            count = min(5, num_frames - done)
            yield torch.from_numpy(
                np.stack(
                    [
                        [random_state("test-noise", seed, f).randint(256, size=(*SIZE, 3), dtype=np.uint8)
                         for f in range(first + done, first + done + count)]
                        for seed, first in zip(seeds, start, strict=True)
                    ]
                )
            )  # fmt: skip


def measure(dataset_path: Path, **options: Any) -> dict[str, Any]:
    real = ClipDataset(dataset_path, [SIZE])
    return metric_main.calc_metric("fvd3_9f", real=real, size=SIZE, fake_source=Noise(), **options)


def test_names_say_clips_frames_and_spacing():
    assert metric_main.list_valid_metrics() == ["fvd2048_16f", "fvd2048_128f", "fvd2048_128f_subsample8f"]
    meanings = [(m.num_items, m.shape) for m in map(metric_main.parse, metric_main.list_valid_metrics())]
    assert meanings == [(2048, ClipShape(16)), (2048, ClipShape(128)), (2048, ClipShape(16, 8))]
    assert metric_main.parse("fvd300_90f_subsample10f").shape == ClipShape(9, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fvd2048_16", r"did you mean fvd2048_16f.* have the form fvd<clips>_<frames>f"),
        ("fid50k_full", "Unknown metric 'fid50k_full'.* have the form fvd<clips>_<frames>f"),
        ("fvd2048_8f", "8 frames a clip; I3D needs at least 9"),
        ("fvd2048_64f_subsample8f", "8 frames a clip; I3D needs at least 9"),
        ("fvd2048_100f_subsample8f", "a multiple of the spacing"),
        ("fvd0_16f", "at least one clip"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        metric_main.parse(name)


def test_value_depends_neither_on_batch_nor_on_cache(dataset_path: Path, own_cache: Path, capsys):
    told = []
    first = measure(dataset_path, batch=2, progress=lambda *report: told.append(report))
    assert [report for report in told if report[1] == report[2]] == [("real", 3, 3), ("generated", 3, 3)]
    assert len(list((own_cache / "metrics").glob("*.npz"))) == 1

    told.clear()
    hit = measure(dataset_path, batch=1, progress=lambda *report: told.append(report))
    assert {side for side, *_ in told} == {"generated"}, "real features came from the cache"
    again = measure(dataset_path, batch=1, replace_cache=True)
    value = first["results"]["fvd3_9f"]
    assert value > 10
    assert hit["results"]["fvd3_9f"] == pytest.approx(value, rel=1e-6)
    assert again["results"]["fvd3_9f"] == pytest.approx(value, rel=1e-6)

    assert (first["num_real"], first["num_fake"], first["world_size"]) == (3, 3, 1)
    assert first["detector"]["weights"] == "verified"
    assert first["protocol"]["frame_spacing"] == 1
    assert "measured on 3 clips; below 256" in first["warning"]
    assert first["warning"] in capsys.readouterr().out
    assert json.loads(json.dumps(first)) == first


def test_clips_that_are_too_short_are_refused(dataset_path: Path, own_cache: Path):
    real = ClipDataset(dataset_path, [SIZE])
    with pytest.raises(ValueError, match="no clip of 41 frames"):
        metric_main.calc_metric("fvd4_41f", real=real, size=SIZE, fake_source=Noise())


def test_fvd_between_takes_arrays_and_iterators():
    black, white = np.zeros((1, 10, 16, 16, 3), np.uint8), np.full((2, 10, 16, 16, 3), 255, np.uint8)
    result = metric_main.fvd_between(black, iter(white))
    assert result["fvd"] == pytest.approx(569.771, abs=2e-3)
    assert (result["num_a"], result["num_b"]) == (1, 2)
    assert "FVD was measured on 1 clips" in result["warning"]
