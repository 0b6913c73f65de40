"""Parse the names of metrics: a family is one row of a table, and takes other numbers than the published ones.

Imports no torch, so that command lines can check names at once.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

I3D, MOTION, C3D = "i3d-kinetics-400", "efficientnet-lite0-motion", "c3d-ucf101"
INCEPTION, EFFICIENTNET = "inception-2015-12-05", "efficientnet-lite0"

# How each detector resizes frames, as results report it.
PREPARATION = {
    I3D: "stretched to 224x224, bilinear, half-pixel centres, no antialiasing",
    MOTION: "stretched to 224x224, bilinear, half-pixel centres, antialiased",
    EFFICIENTNET: "stretched to 224x224, bilinear, half-pixel centres, antialiased",
    INCEPTION: "stretched to 299x299, bilinear as TensorFlow 1, no antialiasing",
    C3D: "as the detector's file does it",
}


FEWEST = {"frechet": 1, "kernel": 2, "score": 10, "manifold": 4}  # items for which an estimator is defined

# The keys of `metrics.long_video.MEASURES`.
LONG_MEASURES = (
    "color_similarity",
    "motion_energy_w1",
    "seam_ratio",
    "loop_rate",
    "feature_similarity",
    "fvd_drift",
    "kvd_drift",
    "fmd_drift",
)


@dataclass(frozen=True)
class ClipShape:
    """`num_frames` frames, `spacing` apart."""

    num_frames: int
    spacing: int = 1

    @property
    def span(self) -> int:
        """Return the number of consecutive frames from the first to the last, both included."""
        return (self.num_frames - 1) * self.spacing + 1


@dataclass(frozen=True)
class Family:
    """A row: the form of the names, which features are taken of which frames, and the estimator."""

    form: str
    pattern: str  # groups: items, then frames and spacing of a clip
    published: tuple[str, ...]
    estimator: str  # "frechet", "kernel", "score" or "manifold"
    detector: str
    real: str  # frames of existing real footage: "clips" as for generated ones, "all" frames, "some", or "none"
    most_real: int = 0  # of "all", at most so many at random, as published; 0: no limit
    output: str = "features"  # or "logits"
    clip: ClipShape | None = None  # where it is not part of the name
    min_frames: int = 1
    scale: float = 1.0
    needs: str = ""  # the detector that needs `min_frames`
    is_higher_better: bool = False


@dataclass(frozen=True)
class Metric:
    """A parsed name."""

    name: str
    family: Family
    num_items: int
    shape: ClipShape


_CLIPS = r"(\d+)_(\d+)f(?:_subsample(\d+)f)?"
_FRAME = ClipShape(1)

FAMILIES = (
    Family(
        form="fvd<clips>_<frames>f or fvd<clips>_<frames>f_subsample<S>f, as fvd2048_16f",
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
    """Parse the name of a metric; `ValueError` with the nearest names and the valid forms if it has none."""
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            return _metric(family, match)
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
    num_frames, spacing = (int(group or 1) for group in match.groups()[1:])
    if spacing == 0 or num_frames % spacing:
        raise ValueError(f"{name} needs a number of frames that is a multiple of the spacing")
    if num_frames // spacing < family.min_frames:
        raise ValueError(
            f"{name} has {num_frames // spacing} frames a clip; {family.needs} needs at least {family.min_frames}"
        )
    return Metric(name, family, num_items, ClipShape(num_frames // spacing, spacing))
