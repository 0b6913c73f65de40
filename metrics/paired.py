"""Compare clips with the real ones that they should equal: PSNR, SSIM and LPIPS of each frame, as curves over time.

    from metrics import paired

    psnr, ssim = paired.psnr(x, y), paired.ssim(x, y)  # (N, 3, H, W) in [0, 1], twice -> float64 (N,)

A tokenizer is compared with its input, a predictor with the frames that follow its context. Values are means over
frames, then over the samples of a context, then over contexts.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metrics.detectors import registry
from metrics.extraction import Features
from metrics.families import LPIPS_ALEX, LPIPS_VGG, PSNR, SSIM, Metric
from metrics.long_video_base import Rows, chart, jackknife_variance, line

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, as published
PSNR_LIMIT = 100.0  # dB, at which equal frames count; frames that differ in one value of 8 bits are below it
FRAMES_AT_ONCE = 64
REAL = "real"  # the line of other real clips
TITLES = {PSNR: "PSNR (dB)", SSIM: "SSIM", LPIPS_ALEX: "LPIPS (AlexNet)", LPIPS_VGG: "LPIPS (VGG16)"}


# ----------------------------------------------------------------------------
# Formulas.


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1]: (N, ...), twice -> float64 (N,).

    The mean square is taken over channels, height and width; equal images give infinity.
    """
    return -10 * (x.double() - y.double()).square().flatten(1).mean(dim=1).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of images in [0, 1]: (N, C, H, W), twice -> float64 (N,); see `ssim_map`."""
    return ssim_map(x, y).flatten(1).mean(dim=1)


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity around each pixel: (N, C, H, W), twice -> float64 (N, C, H - 10, W - 10).

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004: a Gaussian window of
    11x11 with a standard deviation of 1.5, K1 = 0.01, K2 = 0.03, each channel by itself, covariances of the population,
    only where the window lies within the image. Raises `ValueError` for smaller images.
    """
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(
            f"SSIM got images of {x.shape[2]}x{x.shape[3]}, and needs {WINDOW} pixels per side; measure larger ones"
        )
    x, y = x.double(), y.double()
    rows, columns = (_blur(edge, x.device) for edge in x.shape[2:])
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (rows @ z @ columns.T for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, covariance = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (var_x + var_y + c2)


def _blur(edge: int, device: torch.device) -> Tensor:
    """Return the Gaussian window along one axis as a matrix: float64 (edge - 10, edge)."""
    distance = torch.arange(WINDOW, dtype=torch.float64, device=device) - WINDOW // 2
    weights = (-0.5 * (distance / SIGMA).square()).exp()
    matrix = torch.zeros(edge - WINDOW + 1, edge, dtype=torch.float64, device=device)
    for row in range(len(matrix)):
        matrix[row, row : row + WINDOW] = weights / weights.sum()
    return matrix


# ----------------------------------------------------------------------------
# Comparisons of clips.


class Comparison(Protocol):
    """Compares clips frame by frame."""

    identity: dict[str, Any]
    averaged: str  # how frames are compared, for results

    def compare(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the value of each frame: uint8 (N, 3, T, H, W), twice -> float32 (N, T)."""
        ...


class _Formula:
    """A comparison by `psnr` or `ssim`."""

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.device, self.formula = device, {PSNR: psnr, SSIM: ssim}[name]
        self.identity: dict[str, Any] = {"name": name, "sha256": ""}
        self.averaged = {
            PSNR: f"-10 log10(mean square over channels and pixels) of values in [0, 1], at most {PSNR_LIMIT:g}",
            SSIM: "Gaussian window 11x11, sigma 1.5, K 0.01 and 0.03, valid region, mean over channels and pixels",
        }[name]

    def compare(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Comparison`."""
        parts = zip(_frames(x).split(FRAMES_AT_ONCE), _frames(y).split(FRAMES_AT_ONCE), strict=True)
        values = [self.formula(*(part.to(self.device).double() / 255 for part in pair)) for pair in parts]
        return torch.cat(values).clamp(max=PSNR_LIMIT).float().view(len(x), -1)


class _Perceptual:
    """A comparison by LPIPS."""

    averaged = "LPIPS 0.1 of frames at their own size, mean over pixels"

    def __init__(self, name: str, device: torch.device | str, path: str | None) -> None:
        self.network = registry.open_detector(name, device, path)
        self.identity = self.network.identity

    def compare(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Comparison`."""
        device = self.network.mean.device
        return self.network.distance(_frames(x).to(device), _frames(y).to(device)).view(len(x), -1)


def open_comparison(name: str, device: torch.device | str, path: str | None = None) -> Comparison:
    """Return the comparison of a name of `TITLES`; `path` is a file of weights."""
    return _Formula(name, device) if name in (PSNR, SSIM) else _Perceptual(name, device, path)


def _frames(clips: Tensor) -> Tensor:
    """Return the frames of clips (N, 3, T, H, W): (N T, 3, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


# ----------------------------------------------------------------------------
# Results.


def summarize(
    metric: Metric, fake: Features, samples: int, others: Features | None, baselines: Mapping[str, Features]
) -> dict[str, Any]:
    """Return results, errors, floors, baselines and curves of one comparison.

    Each side holds values (N, T) of frames: `fake` those of the generated clips, the samples of a context one after
    another; `others` of real clips compared with other real ones, the floor; `baselines` of what stands in for
    predictions, by what it is. The best sample of a context is that with the best mean over time, as in the literature.
    Errors are standard errors over the videos that contexts come from.
    """
    name, values = metric.name, _rows(fake)
    by_context = values.values.reshape(-1, samples, values.values.shape[1])
    videos = values.videos[::samples]
    means = Rows(by_context.mean(axis=1), videos)
    curves = {name: means}
    if samples > 1:
        order = by_context.mean(axis=2)
        best = order.argmax(axis=1) if metric.family.is_higher_better else order.argmin(axis=1)
        curves[f"{name}_best{samples}"] = Rows(by_context[np.arange(len(best)), best], videos)
    results, errors, lines = {}, {}, []
    for key, rows in curves.items():
        error = _errors(rows)
        results[key] = float(rows.values.mean())
        if error is not None:
            errors[key] = float(error[0])
        label = "generated" if key == name else f"best of {samples}"
        frames = np.arange(1, rows.values.shape[1] + 1)
        lines.append(line(label, frames, rows.values.mean(axis=0), None if error is None else error[1:]))
    floors, below = {}, {}
    for what, features in {**baselines, **({} if others is None else {REAL: others})}.items():
        rows = _rows(features)
        lines.append(line(what, np.arange(1, rows.values.shape[1] + 1), rows.values.mean(axis=0)))
        target = floors if what == REAL else below.setdefault(what, {})
        target |= dict.fromkeys(results, float(rows.values.mean()))
    drawn = chart(f"{TITLES[metric.family.detector]} over time", "frame", lines, band="standard error over videos")
    found = {"results": results, "errors": errors, "floors": floors, "curves": [drawn]}
    return {**found, **({"baselines": below} if below else {})}


def _rows(features: Features) -> Rows:
    assert features.values is not None, "values of pairs are kept"
    return Rows(features.values.double().numpy(), features.videos)


def _errors(rows: Rows) -> np.ndarray | None:
    """Return the standard errors of the mean, and of the mean at each time: (1 + T,); None of a single row."""
    if len(rows) < 2:
        return None
    both = rows.of(np.concatenate([rows.values.mean(axis=1, keepdims=True), rows.values], axis=1))
    return np.sqrt(jackknife_variance(lambda values: values.mean(axis=0), both))
