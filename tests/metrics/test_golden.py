"""The formulas of distances and of frames compared, against the numbers that published code gave."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from metrics import paired
from metrics.frechet import frechet_distance_from_features
from metrics.kernel import polynomial_distance
from tests import golden_files

CALL = re.compile(r"RandomState\(\d+\)\.\w+\(\([\d, ]+\)\)")
WAVE = re.compile(r"(sin|cos)\(([\d.]+) i\)([^(]*)\(([\d, ]+)\)")


def features(text: str) -> np.ndarray:
    """Return the array of "RandomState(4).standard_normal((48,8))*1.3+0.2", or of "cos(0.83 i)+0.2 (40,6)"."""
    if (call := CALL.match(text)) is not None:
        return golden_files.number(f"x{text[call.end() :]}", x=golden_files.draws(call.group())[0])
    wave = WAVE.fullmatch(text)
    assert wave is not None, text
    shape = golden_files.number(f"({wave[4]})")
    values = getattr(np, wave[1])(float(wave[2]) * np.arange(np.prod(shape)))
    return golden_files.number(f"x{wave[3]}", x=values).reshape(shape)


@golden_files.entries("tats", "metrics*")
def test_distances_are_those_of_tats(entry, golden):
    for case in (entry, *(value for value in entry.values() if isinstance(value, dict))):
        x, y = features(case["X"]), features(case["Y"])
        found = frechet_distance_from_features(x, y, is_unbiased=True)
        # The release computes in float32, which is good to 5e-4 where covariances are of low rank.
        published = {"frechet": 1e-3, "frechet_float32": 1e-3, "frechet_float64": 1e-5}
        for name in published.keys() & case.keys():
            assert found == pytest.approx(case[name], rel=published[name]), name
        assert polynomial_distance(x, y) == pytest.approx(case["kvd"], rel=1e-5)


def images(text: str, seed: int) -> list[torch.Tensor]:
    """Return both arrays of "a = RS(40).uniform(size=(2,20,18,3)) ...; b = clip(a + 0.1*RS(41)..., 0, 1) ..."."""
    first, second = text.split(";")
    a = golden_files.draws(first, seed)[0].astype(np.float32)
    (noise,) = golden_files.draws(second.replace("a.shape", str(a.shape)), seed)
    low, high = re.findall(r", ([\d.]+), ([\d.]+)\)", second)[-1]
    b = np.clip(a + noise, float(low), float(high)).astype(np.float32)
    return [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (a, b)]


@golden_files.entries("teco", "metrics*")
def test_frames_are_compared_as_by_teco(entry: dict[str, Any], golden):
    x, y = images(entry["input"], golden["about"]["seed"])
    # The release's `ssim_per_channel` averages over channels and rows, and leaves the columns.
    found = {"psnr": paired.psnr(x, y), "ssim": paired.ssim(x, y)}
    found["ssim_per_channel"] = paired.ssim_map(x, y).mean(dim=(1, 2))
    assert entry.keys() - {"input"} <= found.keys()
    for name in entry.keys() & found.keys():
        golden_files.check(found[name], entry[name], single=5e-5, where=name)
