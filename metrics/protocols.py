"""Evaluation protocols in published use: which clips are compared, and how Gaussians are fitted. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalProtocol:
    """How clips are chosen and covariances estimated; values of different protocols are not comparable.

    `context` and `horizon` apply to samplers that are prompted with windows of real videos. A window holds `context`
    frames before the first generated one, of which a sampler may use fewer, and `horizon` generated frames, of which a
    clip is the first ones. Models that need different context are compared on the same frames by the same `context`,
    and metrics of different length by the same `horizon`.
    """

    name: str
    windows: str  # of footage: "passes" over shuffled videos, or the first videos, "sorted"
    has_phase: bool  # generated clips start anywhere in a sampler's period, else at frame 0
    has_weights: bool  # frames of real footage count 1 / length of their video, else alike
    is_unbiased: bool  # covariances are divided by N - 1, else by N
    context: int | None = None  # None: the frames that the sampler needs
    horizon: int | None = None  # None: the frames that the metric needs


PROTOCOLS = {
    "lvg": EvalProtocol("lvg", "passes", has_phase=True, has_weights=True, is_unbiased=False),
    "stylegan_v": EvalProtocol("stylegan_v", "sorted", has_phase=False, has_weights=False, is_unbiased=False),
    "tats": EvalProtocol("tats", "passes", has_phase=False, has_weights=False, is_unbiased=True),
}
