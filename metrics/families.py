"""Parse the names of metrics: a family is one row of a table, and takes other numbers than the published ones.

Imports no torch, so that command lines can check names at once.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

I3D, MOTION, C3D = "i3d-kinetics-400", "efficientnet-lite0-motion", "c3d-ucf101"
INCEPTION, EFFICIENTNET = "inception-2015-12-05", "efficientnet-lite0"
ACTION_NETWORK = "action-network"  # of `metrics.action_following`
PSNR, SSIM, LPIPS_ALEX, LPIPS_VGG = "psnr", "ssim", "lpips-alex", "lpips-vgg"  # of `metrics.paired`

# How each detector resizes frames, as results report it.
PREPARATION = {
    I3D: "stretched to 224x224, bilinear, half-pixel centres, no antialiasing",
    MOTION: "stretched to 224x224, bilinear, half-pixel centres, antialiased",
    EFFICIENTNET: "stretched to 224x224, bilinear, half-pixel centres, antialiased",
    INCEPTION: "stretched to 299x299, bilinear as TensorFlow 1, no antialiasing",
    C3D: "as the detector's file does it",
    **dict.fromkeys((PSNR, SSIM, LPIPS_ALEX, LPIPS_VGG), "none"),
}


FEWEST = {"frechet": 1, "kernel": 2, "score": 10, "manifold": 4, "paired": 1}  # items for which an estimator is defined

# The keys of `metrics.long_video.MEASURES`.
LONG_MEASURES = (
    "color_similarity",
    "motion_energy_w1",
    "motion_energy",
    "flat_frames",
    "seam_ratio",
    "loop_rate",
    "feature_similarity",
    "fvd_drift",
    "kvd_drift",
    "fmd_drift",
    "there_and_back",
    "there_and_back_lpips",
    "there_and_back_walk",
    "revisit",
    "revisit_lpips",
    "turning",
    "action_following",
)


@dataclass(frozen=True)
class ClipShape:
    """`num_frames` frames, `spacing` apart; the first `context` of them are real ones before the generated frames."""

    num_frames: int
    spacing: int = 1
    context: int = 0

    @property
    def span(self) -> int:
        """Return the number of consecutive frames from the first to the last, both included."""
        return (self.num_frames - 1) * self.spacing + 1

    @property
    def new_span(self) -> int:
        """Return the same without the context."""
        return self.span - self.context


@dataclass(frozen=True)
class Family:
    """A row: the form of the names, which features are taken of which frames, and the estimator."""

    form: str
    pattern: str  # groups: items, then frames of a clip, and named ones
    published: tuple[str, ...]
    estimator: str  # "frechet", "kernel", "score", "manifold" or "paired"
    detector: str
    real: str  # frames of existing real footage: "clips" as for generated ones, "all", "some", "others", or "none"
    most_real: int = 0  # of "all", at most so many at random, as published; 0: no limit
    output: str = "features"  # or "logits", or of clips "frames", or "pairs" with real ones, both frame by frame
    clip: ClipShape | None = None  # where it is not part of the name
    min_frames: int = 1
    scale: float = 1.0
    needs: str = ""  # the detector that needs `min_frames`
    is_higher_better: bool = False

    @property
    def is_paired(self) -> bool:
        """Return whether each generated clip is compared with the real one that it should equal."""
        return self.estimator == "paired"

    @property
    def is_distance(self) -> bool:
        """Return whether it is a distance of two sets of clips; of reconstructions its name begins with r."""
        return self.estimator in ("frechet", "kernel")


@dataclass(frozen=True)
class Metric:
    """A parsed name, without the r of those that ask for reconstructions."""

    name: str
    family: Family
    num_items: int
    shape: ClipShape
    of_reconstructions: bool = False


_CLIPS = r"(\d+)_(\d+)f(?:_subsample(?P<spacing>\d+)f)?(?:_context(?P<context>\d+))?"
_FRAMES = r"(\d+)_(\d+)f"
_FRAME = ClipShape(1)


def _paired(name: str, detector: str, is_higher_better: bool) -> Family:
    return Family(
        form=f"{name}<clips>_<frames>f",
        pattern=f"{name}{_FRAMES}",
        published=(f"{name}256_16f",),
        estimator="paired",
        detector=detector,
        real="others",
        output="pairs",
        is_higher_better=is_higher_better,
    )


FAMILIES = (
    Family(
        form="fvd<clips>_<frames>f, fvd<clips>_<frames>f_subsample<S>f or fvd<clips>_<frames>f_context<C>, as "
        "fvd2048_16f",
        pattern=f"fvd{_CLIPS}",
        published=("fvd2048_16f", "fvd2048_128f", "fvd2048_128f_subsample8f"),
        estimator="frechet",
        detector=I3D,
        real="clips",
        min_frames=9,
        needs="I3D",
    ),
    Family(
        form="kvd<clips>_<frames>f",
        pattern=f"kvd{_CLIPS}",
        published=("kvd2048_16f", "kvd2048_128f"),
        estimator="kernel",
        detector=I3D,
        real="clips",
        min_frames=9,
        needs="I3D",
    ),
    Family(
        form="fmd<clips>_<frames>f",
        pattern=f"fmd{_CLIPS}",
        published=("fmd2048_16f",),
        estimator="frechet",
        detector=MOTION,
        real="clips",
        min_frames=3,
        needs="the motion descriptor",
    ),
    Family(
        "fd<frames>_efflite0", r"fd(\d+k?)_efflite0", ("fd50k_efflite0",), "frechet", EFFICIENTNET, "all", clip=_FRAME
    ),
    Family("fid<frames>_full", r"fid(\d+k?)_full", ("fid50k_full",), "frechet", INCEPTION, "all", clip=_FRAME),
    Family(
        form="fid<clips>_<frames>f",
        pattern=f"fid{_FRAMES}",
        published=("fid256_16f",),
        estimator="frechet",
        detector=INCEPTION,
        real="clips",
        output="frames",
    ),
    Family(
        form="fd<clips>_<frames>f_efflite0",
        pattern=f"fd{_FRAMES}_efflite0",
        published=("fd256_16f_efflite0",),
        estimator="frechet",
        detector=EFFICIENTNET,
        real="clips",
        output="frames",
    ),
    Family(
        form="kid<frames>_full",
        pattern=r"kid(\d+k?)_full",
        published=("kid50k_full",),
        estimator="kernel",
        detector=INCEPTION,
        real="all",
        most_real=1_000_000,
        clip=_FRAME,
        scale=1000.0,
    ),
    Family(
        form="is<frames>",
        pattern=r"is(\d+k?)",
        published=("is50k",),
        estimator="score",
        detector=INCEPTION,
        real="none",
        output="logits",
        clip=_FRAME,
        is_higher_better=True,
    ),
    Family(
        form="isv<clips>_ucf",
        pattern=r"isv(\d+)_ucf",
        published=("isv2048_ucf",),
        estimator="score",
        detector=C3D,
        real="none",
        output="logits",
        clip=ClipShape(16),
        is_higher_better=True,
    ),
    Family(
        form="pr<thousands of frames>k3 or pr<frames>_3, as pr50k3",
        pattern=r"pr(\d+k|\d+(?=_))_?3",
        published=("pr50k3",),
        estimator="manifold",
        detector=INCEPTION,
        real="some",
        clip=_FRAME,
        is_higher_better=True,
    ),
    _paired("psnr", PSNR, is_higher_better=True),
    _paired("ssim", SSIM, is_higher_better=True),
    _paired("lpips", LPIPS_ALEX, is_higher_better=False),
    _paired("lpips_vgg", LPIPS_VGG, is_higher_better=False),
)  # fmt: skip


def list_valid_metrics() -> list[str]:
    """Return the names in published use; each family takes other numbers too."""
    return [name for family in FAMILIES for name in family.published]


def check_names(names: Sequence[str]) -> None:
    """Raise `ValueError` unless each name is that of a metric or of a measure of long videos."""
    for name in names:
        if name not in LONG_MEASURES:
            parse(name)


def parse(name: str) -> Metric:
    """Parse the name of a metric; `ValueError` with the nearest names and the valid forms if it has none.

    A distance of clips or frames may begin with r, as rfvd256_16f: that of reconstructions.
    """
    for family in FAMILIES:
        begins = "r" if family.is_distance and name.startswith("r") else ""
        if match := re.fullmatch(family.pattern, name.removeprefix(begins)):
            return dataclasses.replace(_metric(family, match), of_reconstructions=bool(begins))
    near = difflib.get_close_matches(name, [*list_valid_metrics(), *LONG_MEASURES], n=3, cutoff=0.4)
    guess = f"; did you mean {' or '.join(near)}?" if near else "."
    forms = ", ".join([*(family.form for family in FAMILIES), *LONG_MEASURES])
    raise ValueError(f"Unknown metric {name!r}{guess} Valid names have the form {forms}")


def _metric(family: Family, match: re.Match[str]) -> Metric:
    name, text = match.group(), match.group(1)
    num_items = int(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)
    if num_items < FEWEST[family.estimator]:
        raise ValueError(f"{name} needs at least {FEWEST[family.estimator]} clips")
    if family.clip is not None:
        return Metric(name, family, num_items, family.clip)
    num_frames, groups = int(match.group(2)), match.groupdict()
    spacing, context = int(groups.get("spacing") or 1), int(groups.get("context") or 0)
    if spacing == 0 or num_frames % spacing:
        raise ValueError(f"{name} needs a number of frames that is a multiple of the spacing")
    if spacing > 1 and context:
        raise ValueError(f"{name} has context frames, which are consecutive: leave out subsample")
    if num_frames // spacing < family.min_frames:
        raise ValueError(
            f"{name} has {num_frames // spacing} frames a clip; {family.needs or 'it'} needs at least "
            f"{family.min_frames}"
        )
    if context >= num_frames:
        raise ValueError(f"{name} has {num_frames} frames a clip, of which {context} are context: compare more frames")
    return Metric(name, family, num_items, ClipShape(num_frames // spacing, spacing, context))
