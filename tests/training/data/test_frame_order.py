"""Frames follow the numbers in their names as their author meant them, or two names say why they do not."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.frame_order import order_frames


def png(text: str) -> list[str]:
    return [f"{stem}.png" for stem in text.split()]


RUNS = {
    "whole": ["f0 f1 f2 f9 f10 f11".replace("f9", "f3 f4 f5 f6 f7 f8 f9")],
    "padded": ["0008 0009 0010 0011"],
    "decimals": ["t0 t0.25 t0.5 t0.75 t1 t1.25"],
    "decimals, rounded": ["0 0.033 0.067 0.1 0.133 0.167 0.2"],
    "seconds since 1970": ["1700000000.0 1700000000.033 1700000000.067 1700000000.1"],
    "whole numbers after a dot": ["shot12.9 shot12.10 shot12.11 shot12.12"],
    "padded numbers after a dot": ["frame.0098 frame.0099 frame.0100"],
    "negative": ["-2 -1 0 1"],
    "negative and named": ["t-2 t-1 t0 t1"],
    "negative decimals": ["x-0.5 x-0.25 x0 x0.25 x0.5"],
    "negative alone": ["-3 -2 -1"],
    "dashes": ["f-1 f-2 f-3"],
    "every tenth": ["0 10 20 30 40"],
    "dates": ["2026.01.30 2026.01.31 2026.02.01 2026.02.02"],
    "times": ["2026-01-31_12-59-50 2026-01-31_12-59-55 2026-01-31_13-00-00 2026-01-31_13-00-05"],
    "words": ["dawn dusk noon"],
    "one": ["7"],
    # What follows is divided.
    "gap": ["0000 0001 0002 0003", "0050 0051 0052 0053"],
    "one is missing": ["0 1 2", "4 5 6"],
    "one of every tenth is missing": ["0 10 20", "40 50 60"],
    "gap of decimals": ["0 0.25 0.5 0.75", "3 3.25 3.5"],
    "gap across zero": ["-4 -3 -2", "1 2 3"],
    "two kinds": ["1_image 2_image 3_image", "1_mask 2_mask 3_mask"],
    "two cameras": ["left_0 left_1", "right_0 right_1"],
    "two takes": ["take1_0046 take1_0047", "take2_0000 take2_0001"],
    "a cover": ["0 1 2", "cover"],
}


@pytest.mark.parametrize("case", RUNS)
def test_frames_are_ordered_and_divided(case):
    runs = [png(text) for text in RUNS[case]]
    names = [name for run in runs for name in run]
    for seed in range(3):
        assert order_frames(random.Random(seed).sample(names, len(names))) == runs


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "01.png", "2.png"], "01.png and 1.png have the same number"),
        (["1.png", "1.jpg", "2.png"], "1.jpg and 1.png have the same number"),
        (png("t0 t0.25 t0.5 t0.50 t1"), "t0.5.png and t0.50.png have the same number"),
        (png("0.1 0.35 0.4"), "0.35.png and 0.4.png have numbers that may be decimals or not"),
    ],
)
def test_doubles_and_unclear_orders_are_refused_with_two_names(names, message):
    with pytest.raises(ValueError, match=message):
        order_frames(names)


@given(
    numbers=st.sets(st.integers(-50, 50), min_size=2),
    scale=st.sampled_from([1, 0.5, 0.25]),
    prefix=st.sampled_from(["", "t", "frame_", "cam2 "]),
)
def test_shortest_decimals_of_either_sign_are_in_order(numbers, scale, prefix):
    """Those among which there are whole ones, and frames 0 and 1."""
    by_name = {f"{prefix}{number * scale:g}.png": number for number in numbers | {0, round(1 / scale)}}
    runs = order_frames(sorted(by_name))
    assert [by_name[name] for run in runs for name in run] == sorted(by_name.values())


@given(st.sets(st.integers(0, 10**6), min_size=2))
def test_each_run_has_steps_alike_and_longer_ones_between(numbers):
    runs = [[int(name[:-4]) for name in run] for run in order_frames([f"{number}.png" for number in numbers])]
    assert [number for run in runs for number in run] == sorted(numbers)
    steps = sorted(b - a for a, b in zip(sorted(numbers), sorted(numbers)[1:], strict=False))
    usual = steps[(len(steps) - 1) // 2]
    assert all(b - a <= 1.5 * usual for run in runs for a, b in zip(run, run[1:], strict=False))
    assert all(after[0] - before[-1] > 1.5 * usual for before, after in zip(runs, runs[1:], strict=False))
