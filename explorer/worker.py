"""One thread that does the work of many tasks, a step at a time, so that a long one does not hold up the others.

worker = Worker()
task = worker.submit(steps(), owner="a tab", turn=3)    # `steps` is a generator function; what it returns is the result
task.wait(0.5) and task.result()
worker.stop(timeout_sec=5)

Tasks take turns after each `yield`. The next step is one of the owner whose last step was longest ago, so that many
tasks of one owner do not slow down those of others; an owner's own tasks take turns too. A task that is cancelled, or
whose owner has asked for something else since, is closed at its next turn, by this thread too. What a task yields is
kept until its next step, as its progress.
"""

import collections
import threading
from collections.abc import Generator
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Steps = Generator[Any, None, Result]  # what is yielded is the progress; what is returned is the result


class Busy(RuntimeError):
    """As many tasks as may wait do."""


class Cancelled(RuntimeError):
    """A task ended before its result."""


_UNWANTED = "it is no longer wanted"


class Task(Generic[Result]):
    """Work that is done in steps, and its result once it has ended."""

    def __init__(self, steps: Steps[Result], owner: str, turn: int) -> None:
        self.owner, self.turn = owner, turn
        self.progress: Any = None  # what the last step yielded
        self._steps = steps
        self._is_cancelled = self._has_begun = False
        self._ended = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    def cancel(self) -> None:
        """Give the task up; does nothing to one that has ended."""
        self._is_cancelled = True

    @property
    def has_ended(self) -> bool:
        """Return whether `result` gives or raises something."""
        return self._ended.is_set()

    def wait(self, timeout_sec: float | None = None) -> bool:
        """Wait for the end; return False if it has not come in time."""
        return self._ended.wait(timeout_sec)

    def result(self) -> Result:
        """Return what the task returned; raise what it raised, or `Cancelled`."""
        assert self.has_ended, "wait for the task first"
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # a result may well be None

    def _step(self) -> bool:
        """Do the next step; return False if it was the last. Only for the worker's thread."""
        try:
            if self._is_cancelled:
                self._steps.close()
                raise Cancelled(_UNWANTED)
            self._has_begun = True
            self.progress = next(self._steps)
            return True
        except StopIteration as end:
            self._result = end.value
        except BaseException as error:  # it is raised where the result is asked for
            self._error = error
        self._ended.set()
        return False

    def _is_over(self) -> bool:
        """End without a step, if it was cancelled before its first. Only while it is in the queue."""
        if self._is_cancelled and not self._has_begun:
            self._error = Cancelled(_UNWANTED)
            self._ended.set()
        return self.has_ended


class Worker:
    """A thread and its queue, which holds at most `max_tasks` tasks, at most `max_per_owner` of them of one owner."""

    def __init__(self, max_tasks: int = 64, max_per_owner: int = 8) -> None:
        self.max_tasks, self.max_per_owner = max_tasks, max_per_owner
        self._queue: collections.deque[Task[Any]] = collections.deque()
        self._current: Task[Any] | None = None
        self._served: dict[str, int] = {}  # owner -> number of the last step that was his
        self._num_steps = 0
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def submit(self, steps: Steps[Result], owner: str = "", turn: int = 0) -> Task[Result]:
        """Queue work. Tasks of the same owner with a lower turn are cancelled.

        Raises `Busy` if too many tasks wait, and `Cancelled` after `stop` or if there is a task of a higher turn.
        """
        task = Task(steps, owner, turn)
        with self._changed:
            if self._is_stopping:
                raise Cancelled("the program is ending")
            own = [other for other in self._tasks() if other.owner == owner]
            if any(other.turn > turn for other in own):
                raise Cancelled(_UNWANTED)
            for other in own:
                if other.turn < turn:
                    other.cancel()
            # What was cancelled while a long step goes on must not take the places of what is wanted.
            self._queue = collections.deque(other for other in self._queue if not other._is_over())
            num_own = sum(other.owner == owner for other in self._tasks())
            if len(self._tasks()) >= self.max_tasks or num_own >= self.max_per_owner:
                raise Busy(f"{num_own} requests of this page and {len(self._tasks())} of all wait already")
            self._queue.append(task)
            self._changed.notify()
        return task

    def drop(self, owner: str) -> None:
        """Cancel all tasks of an owner."""
        with self._changed:
            for task in self._tasks():
                if task.owner == owner:
                    task.cancel()

    def stop(self, timeout_sec: float) -> bool:
        """Cancel everything and end the thread; return False if the step at hand takes longer than `timeout_sec`."""
        with self._changed:
            self._is_stopping = True
            for task in self._tasks():
                task.cancel()
            self._changed.notify()
        self._thread.join(timeout_sec)
        return not self._thread.is_alive()

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks that have not ended."""
        with self._changed:
            return len(self._tasks())

    def progress(self, owner: str) -> list[Any]:
        """Return what the tasks of an owner yielded last."""
        with self._changed:
            return [task.progress for task in self._tasks() if task.owner == owner]

    def _tasks(self) -> list[Task[Any]]:
        return [*self._queue, *([self._current] if self._current else [])]

    def _take(self) -> Task[Any]:
        """Remove the task of the next step from the queue."""
        task = min(self._queue, key=lambda waiting: self._served.get(waiting.owner, 0))
        self._queue.remove(task)
        self._num_steps += 1
        self._served[task.owner] = self._num_steps
        if len(self._served) > 4 * self.max_tasks:
            owners = {waiting.owner for waiting in (task, *self._queue)}
            self._served = {owner: number for owner, number in self._served.items() if owner in owners}
        return task

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_stopping)
                if not self._queue:
                    return
                task = self._current = self._take()
            goes_on = task._step()
            with self._changed:
                self._current = None
                if goes_on:
                    self._queue.append(task)
