"""The meaning of metric names, and unknown names."""

import pytest

from metrics import families, long_video
from metrics.families import ClipShape

PUBLISHED = {
    "fvd2048_16f": (2048, ClipShape(16)),
    "fvd2048_128f": (2048, ClipShape(128)),
    "fvd2048_128f_subsample8f": (2048, ClipShape(16, 8)),
    "kvd2048_16f": (2048, ClipShape(16)),
    "kvd2048_128f": (2048, ClipShape(128)),
    "fmd2048_16f": (2048, ClipShape(16)),
    "fd50k_efflite0": (50_000, ClipShape(1)),
    "fid50k_full": (50_000, ClipShape(1)),
    "fid256_16f": (256, ClipShape(16)),
    "fd256_16f_efflite0": (256, ClipShape(16)),
    "kid50k_full": (50_000, ClipShape(1)),
    "is50k": (50_000, ClipShape(1)),
    "isv2048_ucf": (2048, ClipShape(16)),
    "pr50k3": (50_000, ClipShape(1)),
    "psnr256_16f": (256, ClipShape(16)),
    "ssim256_16f": (256, ClipShape(16)),
    "lpips256_16f": (256, ClipShape(16)),
    "lpips_vgg256_16f": (256, ClipShape(16)),
}


def test_published_names_say_clips_frames_and_spacing():
    assert families.list_valid_metrics() == list(PUBLISHED)
    meanings = [families.parse(name) for name in PUBLISHED]
    assert [(metric.num_items, metric.shape) for metric in meanings] == list(PUBLISHED.values())


def test_other_numbers_are_names_too():
    assert families.parse("fvd300_90f_subsample10f").shape == ClipShape(9, 10)
    assert families.parse("fid512_full").num_items == 512
    assert families.parse("fd2k_efflite0").num_items == 2000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fvd2048_16", r"did you mean fvd2048_16f.* have the form fvd<clips>_<frames>f"),
        ("fvd2048_8f", "8 frames a clip; I3D needs at least 9"),
        ("kvd2048_64f_subsample8f", "8 frames a clip; I3D needs at least 9"),
        ("fmd2048_2f", "2 frames a clip; the motion descriptor needs at least 3"),
        ("fvd2048_100f_subsample8f", "a multiple of the spacing"),
        ("fvd0_16f", "at least 1 clips"),
        ("kvd1_16f", "at least 2 clips"),
        ("is9", "at least 10 clips"),
        ("loop_rat", "did you mean loop_rate"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        families.check_names([name])


def test_names_of_long_measures_are_those_of_their_table():
    assert list(long_video.MEASURES) == list(families.LONG_MEASURES)
    families.check_names(["loop_rate", "fvd16_16f"])
