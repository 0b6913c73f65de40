"""Evaluation protocols in published use: which clips are compared, and how Gaussians are fitted. Imports no torch.

Those of one system are in its folder, in the table that `protocols` of its `training.registry.Spec` names.
"""

from dataclasses import dataclass

from training import registry


@dataclass(frozen=True)
class EvalProtocol:
    """How clips are chosen, predicted and compared; values of different protocols are not comparable.

    `context` and `horizon` apply to samplers that are prompted with windows of real videos. A window holds `context`
    frames before the first generated one, of which a sampler may use fewer, and `horizon` generated frames, of which a
    clip is the first ones. Models that need different context are compared on the same frames by the same `context`,
    and metrics of different length by the same `horizon`. Whether a distance includes the context frames is part of
    the name of the metric (`_context<C>`).
    """

    name: str
    # Of footage: "passes" over shuffled videos, a random window each visit; the "first" window of each video, once, in
    # shuffled order; or "sorted": the first videos by name, once, which for prompts is "passes".
    windows: str
    has_phase: bool  # generated clips start anywhere in a sampler's period, else at frame 0
    has_weights: bool  # frames of real footage count 1 / length of their video, else alike
    is_unbiased: bool  # covariances are divided by N - 1, else by N
    context: int | None = None  # None: the frames that the sampler needs
    horizon: int | None = None  # None: the frames that the metric needs
    samples: int = 1  # continuations of each context; paired metrics give their mean, and that of the best
    group_size: int | None = None  # distances are means over groups of so many clips of both sides; None: of all
    has_bound: bool = False  # what the model's tokenizer reconstructs is measured first, as the bound of distances
    runs: int = 1  # measurements with other clips, whose mean is reported
    metrics: tuple[str, ...] = ()  # measured unless others are asked for
    num_videos: int = 256  # a side, for measures of long videos
    num_frames: int = 300  # of each of these


def prediction(name: str, context: int, horizon: int, metrics: tuple[str, ...], **changes: object) -> EvalProtocol:
    """Return a protocol of prediction: real and predicted frames count alike, covariances are divided by N - 1."""
    values = {"windows": "passes", "has_phase": False, "has_weights": False, "is_unbiased": True, **changes}
    return EvalProtocol(name, context=context, horizon=horizon, metrics=metrics, **values)  # pyright: ignore[reportArgumentType]


def paired(num_clips: int, num_frames: int) -> tuple[str, ...]:
    """Return the names of the paired metrics of so many predicted frames."""
    return tuple(f"{name}{num_clips}_{num_frames}f" for name in ("psnr", "ssim", "lpips"))


PROTOCOLS = {
    "lvg": EvalProtocol("lvg", "passes", has_phase=True, has_weights=True, is_unbiased=False),
    "stylegan_v": EvalProtocol("stylegan_v", "sorted", has_phase=False, has_weights=False, is_unbiased=False),
    # Video prediction: 256 test clips, distances include the context frames.
    "bair-1to15": prediction(
        "bair-1to15", 1, 15, ("fvd256_16f_context1", *paired(256, 15)), windows="first", samples=100
    ),
    "kth-10to30": prediction("kth-10to30", 10, 30, ("fvd256_40f_context10", *paired(256, 30)), samples=100),
    "kth-10to40": prediction("kth-10to40", 10, 40, ("fvd256_50f_context10", *paired(256, 40)), samples=100),
    "clevrer-2to14": prediction("clevrer-2to14", 2, 14, ("fvd256_16f_context2", *paired(256, 14))),
    "labdoom-36to264": prediction("labdoom-36to264", 36, 264, ("fvd256_300f_context36", *paired(256, 264))),
}


def protocols() -> dict[str, EvalProtocol]:
    """Return all protocols by name, those of registered systems included."""
    found = dict(PROTOCOLS)
    for spec in registry.specs():
        if spec.protocols:
            found |= registry.resolve(spec.protocols)
    return found
