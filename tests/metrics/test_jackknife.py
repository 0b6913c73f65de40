"""The jackknife compared with closed forms, and groups that keep videos together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics import jackknife


def test_a_mean_has_the_textbooks_error_and_no_bias():
    x = np.random.RandomState(0).standard_normal(16)
    value, error = jackknife.summarize(x.mean(), [np.delete(x, i).mean() for i in range(16)])
    assert value == pytest.approx(x.mean())
    assert error == pytest.approx(x.std(ddof=1) / 4)


def test_the_bias_of_a_variance_is_removed():
    x = np.random.RandomState(1).standard_normal(12)
    value, _ = jackknife.summarize(x.var(), [np.delete(x, i).var() for i in range(12)])
    assert value == pytest.approx(x.var(ddof=1))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 16))
def test_a_video_is_in_one_group_and_groups_are_nearly_equal(videos: list[int], num_groups: int):
    groups = jackknife.group_videos(videos, num_groups)
    assert len({(video, group) for video, group in zip(videos, groups.tolist(), strict=True)}) == len(set(videos))
    sizes = np.bincount(groups, minlength=num_groups)
    assert len(sizes) == num_groups
    assert sizes.max() - sizes.min() <= max(videos.count(video) for video in videos)
