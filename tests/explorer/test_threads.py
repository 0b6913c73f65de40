"""Threads for steered frames are those that make them sooner."""

import itertools
import time

import pytest
import torch

from explorer.threads import fastest, limited


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def frames(sec_by_threads, seen=None, count=None):
    """A rollout whose frames take so long with each number of threads."""
    for _ in itertools.count() if count is None else range(count):
        threads = torch.get_num_threads()
        if seen is not None:
            seen.append(threads)
        time.sleep(sec_by_threads[threads])
        yield {}


def test_the_faster_number_is_taken(three_threads):
    seen = []
    assert fastest(frames({1: 0.002, 3: 0.02}, seen)) == 1
    assert {1, 3} == set(seen) and torch.get_num_threads() == 3
    assert fastest(frames({1: 0.02, 3: 0.002})) is None


def test_the_first_frame_of_a_turn_does_not_count(three_threads):
    """Layers that pack weights for a number of threads take long when it has changed."""
    before = 0

    def packing():
        nonlocal before
        while True:
            threads = torch.get_num_threads()
            time.sleep(0.03 if threads != before else {1: 0.01, 3: 0.002}[threads])
            before = threads
            yield {}

    assert fastest(packing()) is None


def test_slow_and_short_rollouts_keep_all_threads(three_threads):
    seen = []
    assert fastest(frames({1: 0.3, 3: 0.3}, seen)) is None and len(seen) == 2, "two frames tell enough"
    assert fastest(frames({1: 0.0, 3: 0.0}, count=1)) is None
    assert fastest(frames({}, count=0)) is None and torch.get_num_threads() == 3


def test_one_thread_needs_no_trial():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fastest(frames({})) is None
    finally:
        torch.set_num_threads(before)


def test_the_limit_ends_with_its_block(three_threads):
    with pytest.raises(KeyError), limited(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3
    with limited(None):
        assert torch.get_num_threads() == 3
