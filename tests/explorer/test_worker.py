"""The worker: results, progress, turns, and the ends of tasks that are no longer wanted."""

import threading

import pytest

from explorer.worker import Busy, Cancelled, Worker


@pytest.fixture
def worker():
    worker = Worker(max_tasks=6, max_per_owner=3)
    yield worker
    assert worker.stop(timeout_sec=10)


@pytest.fixture
def hold(worker):
    """Keep the worker busy with one step until the test lets it go."""
    begun, gate = threading.Event(), threading.Event()

    def steps():
        begun.set()
        assert gate.wait(10)
        yield

    worker.submit(steps(), "holder")
    assert begun.wait(10)
    yield gate
    gate.set()


def count(name, log, number=3):
    for step in range(number):
        log.append((name, step))
        yield
    return name


def test_tasks_take_turns_and_return_results(worker, hold):
    log = []
    tasks = [worker.submit(count(name, log), name) for name in "ab"]
    assert not tasks[0].wait(0.01) and not log
    hold.set()
    assert all(task.wait(10) for task in tasks)
    assert [task.result() for task in tasks] == ["a", "b"]
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_the_progress_of_an_owner_is_what_its_tasks_yielded_last(worker):
    begun, gate = threading.Event(), threading.Event()

    def steps():
        yield 1
        yield 2
        begun.set()
        assert gate.wait(10)

    task = worker.submit(steps(), "tab")
    assert begun.wait(10)
    assert worker.progress("tab") == [2] and worker.progress("other") == []
    gate.set()
    assert task.wait(10) and worker.progress("tab") == []


def test_errors_are_raised_where_results_are_asked_for_and_the_worker_goes_on(worker):
    def steps():
        yield
        raise ValueError("no such thing")

    task = worker.submit(steps())
    assert task.wait(10)
    with pytest.raises(ValueError, match="no such thing"):
        task.result()
    later = worker.submit(count("a", []))
    assert later.wait(10) and later.result() == "a"


def test_a_later_turn_takes_the_place_of_earlier_ones(worker, hold):
    log = []
    first = [worker.submit(count("first", log), "tab", turn=1) for _ in range(3)]
    other = worker.submit(count("other", log), "another tab", turn=0)
    for turn in range(2, 20):  # many jumps while one step goes on: none is refused
        last = worker.submit(count("last", log), "tab", turn)
    assert all(task.has_ended for task in first), "what has not begun ends at once"
    with pytest.raises(Cancelled):
        first[0].result()
    with pytest.raises(Cancelled):
        worker.submit(count("late", log), "tab", turn=5)
    hold.set()
    assert last.wait(10) and other.wait(10)
    assert log == [("other", 0), ("last", 0), ("other", 1), ("last", 1), ("other", 2), ("last", 2)]


def test_what_has_begun_is_closed_by_the_worker(worker):
    begun, closed = threading.Event(), []

    def steps():
        try:
            while True:
                begun.set()
                yield
        finally:
            closed.append(threading.current_thread().name)

    task = worker.submit(steps(), "tab")
    assert begun.wait(10)
    worker.drop("tab")
    assert task.wait(10)
    with pytest.raises(Cancelled):
        task.result()
    assert closed == ["worker"] and worker.num_tasks == 0


def test_the_queue_is_bounded(worker, hold):
    for _ in range(3):
        worker.submit(count("a", []), "a")
    with pytest.raises(Busy, match="3 requests of this page"):
        worker.submit(count("a", []), "a")
    for _ in range(2):
        worker.submit(count("b", []), "b")
    with pytest.raises(Busy, match="6 of all"):
        worker.submit(count("c", []), "c")


def test_stopping_ends_all_tasks(hold, worker):
    task = worker.submit(count("a", []))
    assert not worker.stop(timeout_sec=0.05), "a step is still at work"
    hold.set()
    assert worker.stop(timeout_sec=10)
    assert task.has_ended
    with pytest.raises(Cancelled):
        task.result()
    with pytest.raises(Cancelled):
        worker.submit(count("a", []))
