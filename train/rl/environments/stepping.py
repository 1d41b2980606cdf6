"""Steps of environments that cannot break a run: failures are counted, hanging ones are cut."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from train.rl.protocols import Environment
from train.rl.scoring import safe_step
from train.rl.types import Completion, Problem, Split, Turn


class TimedOut(Exception):
    """A call took longer than the limit of its pool."""


def counted_step(
    environment: Environment, problem: Problem, state: Any, action: Completion
) -> Turn:
    """The environment's turn, or a failed last turn where there is none that can be learned from.

    A step that raises is counted as `scorer_errors`; one that gives no turn, or a reward or info
    that is not finite, as `invalid_turns`. The episode ends unsolved, worth the environment's
    `failure_value`, 0 where it has none.
    """
    try:
        return safe_step(environment, problem, state, action)
    except ValueError:
        return failed_turn(environment, state, "invalid_turns")


def failed_turn(environment: Any, state: Any, counter: str) -> Turn:
    """A last turn of an episode that failed, with 1 in its info under the counter's name."""
    value = float(getattr(environment, "failure_value", 0.0))
    return Turn(state, "", value, True, info={counter: 1.0})


class _Job:
    def __init__(self, key: Hashable, call: Callable[[], Any]):
        self.key, self.call = key, call
        self.started: float | None = None
        self.outcome: Any = None
        self.cut = False


class StepPool:
    """Daemon threads that run calls, each with a limit of time, and give results as they come.

    A thread cannot be stopped: one whose call takes too long is left alone and replaced. Nothing
    waits for it, at the end of the process neither.

    Args:
        threads: Number of calls that run at a time.
        limit_s: Number of seconds after which a running call is cut.

    Attributes:
        hung: Number of calls that were cut.

    Raises:
        ValueError: `threads` is below 1, or `limit_s` is not above 0.
    """

    def __init__(self, threads: int = 8, limit_s: float = 30.0):
        if threads < 1:
            raise ValueError(f"threads={threads}: choose 1 or more")
        if not limit_s > 0:
            raise ValueError(f"limit_s={limit_s}: choose a number of seconds above 0")
        self._limit = limit_s
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Job] = collections.deque()
        self._running: list[_Job] = []
        self._finished: list[_Job] = []
        self._closed = False
        self.hung = 0
        for _ in range(threads):
            self._start()

    def submit(self, key: Hashable, call: Callable[[], Any]) -> None:
        """Run a call as soon as a thread is free.

        Args:
            key: Key that `ready` gives its outcome under.
            call: Function without arguments.
        """
        with self._changed:
            self._waiting.append(_Job(key, call))
            self._changed.notify_all()

    def ready(self, least: int = 1) -> list[tuple[Hashable, Any]]:
        """Keys and outcomes of finished calls, in the order in which they ended.

        An outcome is what the call returned, or the exception that it raised, or `TimedOut`.

        Args:
            least: Number of outcomes to wait for; all of them where fewer calls are under way.
        """
        with self._changed:
            while True:
                self._cut()
                under_way = len(self._waiting) + len(self._running)
                if not under_way or len(self._finished) >= least:
                    break
                started = [job.started for job in self._running if job.started is not None]
                left = min(started) + self._limit - time.monotonic() if started else None
                self._changed.wait(None if left is None else max(left, 0.001))
            found, self._finished = self._finished, []
        return [(job.key, job.outcome) for job in found]

    def close(self) -> None:
        """Let the threads end once they have nothing to do; calls that wait are dropped."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _start(self) -> None:
        threading.Thread(target=self._work, daemon=True, name="environment steps").start()

    def _cut(self) -> None:
        now = time.monotonic()
        for job in list(self._running):
            if job.started is not None and now - job.started > self._limit:
                job.cut = True
                job.outcome = TimedOut(f"no result after {self._limit:g} seconds")
                self._running.remove(job)
                self._finished.append(job)
                self.hung += 1
                self._start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                job.started = time.monotonic()
                self._running.append(job)
                self._changed.notify_all()
            try:
                outcome = job.call()
            except BaseException as error:  # the caller of `ready` decides
                outcome = error
            with self._changed:
                if job.cut:  # another thread has taken this one's position
                    return
                job.outcome = outcome
                self._running.remove(job)
                self._finished.append(job)
                self._changed.notify_all()


@dataclasses.dataclass(frozen=True)
class TimeLimited:
    """An environment whose steps cannot break or hold up a run, for strategies that step in order.

    A step that takes too long ends its episode as a failure and is counted as `timeouts`; failures
    of other kinds are counted as `counted_step` does.

    Attributes:
        environment: Environment to wrap; other wrappers go inside.
        limit_s: Number of seconds after which a step is cut.
    """

    environment: Environment
    limit_s: float = 30.0

    def __post_init__(self):
        object.__setattr__(self, "_pool", StepPool(1, self.limit_s))

    @property
    def name(self) -> str:
        return self.environment.name

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return self.environment.sizes

    @property
    def max_turns(self) -> int | None:
        """Number of turns after which the environment cuts an episode; None where it says none."""
        return getattr(self.environment, "max_turns", None)

    def problem(self, split: Split, index: int) -> Problem:
        return self.environment.problem(split, index)

    def reset(self, problem: Problem) -> Any:
        return self.environment.reset(problem)

    def step(self, state: Any, action: Completion) -> Turn:
        pool: StepPool = self.__dict__["_pool"]
        pool.submit(0, lambda: counted_step(self.environment, action.problem, state, action))
        [(_, outcome)] = pool.ready()
        if isinstance(outcome, TimedOut):
            return failed_turn(self.environment, state, "timeouts")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
