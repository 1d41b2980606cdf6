"""Robust stepping of environments: failures are counted, and calls that hang are abandoned."""

import collections
import contextvars
import dataclasses
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from train.rl.environments.wrapper import EnvironmentWrapper
from train.rl.protocols import Environment
from train.rl.scoring import safe_step
from train.rl.types import Completion, Problem, Split, Turn

_MOST_CUT = 8  # number of timeouts in a row after which an environment counts as hanging
_MOST_HANGING = 64  # number of threads that a run may lose to calls that do not end


class TimedOut(Exception):
    """Raised when a call takes longer than the time limit of its pool."""


class PoolClosed(ValueError):
    """Raised for a call that is given to a closed pool, or is waiting when the pool is closed."""

    def __init__(self):
        super().__init__("the pool is closed and runs no more calls: make a new one")


def counted_step(
    environment: Environment, problem: Problem, state: Any, action: Completion
) -> Turn:
    """Step an environment, and replace an error or an invalid turn by a failed last turn.

    A step that raises is counted in the turn's `info` as `scorer_errors`. A step that does not
    return a `Turn`, or returns an observation that is not a text, or a reward or info that is not
    finite, is counted as `invalid_turns`. The episode then ends unsolved, the reward is the
    environment's `failure_value` (0 if it has none), and `Turn.error` is the reason.

    Args:
        environment: Environment to step.
        problem: Problem of the episode, for error messages.
        state: State of the episode before the action.
        action: Response of the policy.
    """
    try:
        return safe_step(environment, problem, state, action)
    except ValueError as error:
        return failed_turn(environment, state, "invalid_turns", str(error))


def failed_turn(environment: Any, state: Any, counter: str, error: str | BaseException) -> Turn:
    """Make the last turn of an episode that failed, with `info[counter] = 1`.

    Args:
        environment: Environment whose `failure_value` is the reward; 0 if it has none.
        state: State after the turn.
        counter: Name of the counter of this kind of failure, such as `timeouts`.
        error: Reason of the failure as a text, or the exception that caused it.
    """
    value = float(getattr(environment, "failure_value", 0.0))
    reason = error if isinstance(error, str) else reason_of(error)
    return Turn(state, "", value, True, info={counter: 1.0}, error=reason)


def counter_of(error: BaseException) -> str:
    """Return the name of the counter for an exception: `timeouts` or `scorer_errors`."""
    return "timeouts" if isinstance(error, TimedOut) else "scorer_errors"


def reason_of(error: BaseException) -> str:
    """Return the traceback of an exception, or only the message of a `TimedOut`."""
    return str(error) if isinstance(error, TimedOut) else "".join(traceback.format_exception(error))


@dataclasses.dataclass(eq=False)
class _Job:
    """A call that a pool runs in its caller's context (context variables, NumPy's error handling).

    The outcome of a `private` job is stored only in the job, for the caller that waits for it.
    """

    key: Hashable
    call: Callable[[], Any]
    serial: bool = False
    private: bool = False
    started: float | None = None
    outcome: Any = None
    done: bool = False
    context: contextvars.Context = dataclasses.field(default_factory=contextvars.copy_context)

    def run(self) -> Any:
        """Run the call, and return its result or the exception that it raised."""
        try:
            return self.context.run(self.call)
        except SystemExit as error:  # e.g. of a grader: it must not end the run
            return RuntimeError(f"the call ended by sys.exit({error.code})")
        except BaseException as error:  # whoever takes the outcome decides what to do
            return error


class _Workers:
    """Threads of a pool and their jobs, without a reference to the pool, which can thus be freed.

    Args:
        threads: Maximum number of threads that can take a job.
        limit: Number of seconds after which a running job is abandoned.
    """

    def __init__(self, threads: int, limit: float):
        self.limit = limit
        self.changed = threading.Condition()
        self.waiting: collections.deque[_Job] = collections.deque()
        self.running: list[_Job] = []
        self.finished: list[_Job] = []
        self.closed = False
        self.hung = 0
        self.hanging = 0  # number of abandoned calls that are still running
        self._threads = threads
        self._alive = 0  # number of threads, without those whose call was abandoned

    def put(self, job: _Job) -> None:
        with self.changed:
            if self.closed:
                raise PoolClosed
            self.waiting.append(job)
            self._hire()
            self.changed.notify_all()

    def wait(self, enough: Callable[[], bool]) -> None:
        """Wait until `enough()` is true, and abandon late jobs; the caller holds `changed`."""
        while True:
            self._cut()
            if enough():
                return
            started = [job.started for job in self.running if job.started is not None]
            left = min(started) + self.limit - time.monotonic() if started else None
            if left is not None:
                left = min(max(left, 0.001), threading.TIMEOUT_MAX)
            self.changed.wait(left)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            while self.waiting:
                self._finish(self.waiting.popleft(), PoolClosed())
            self.changed.notify_all()

    def _hire(self) -> None:
        while len(self.waiting) > self._alive - len(self.running) and self._alive < self._threads:
            self._alive += 1
            threading.Thread(target=self._work, daemon=True, name="environment steps").start()

    def _cut(self) -> None:
        now = time.monotonic()
        for job in list(self.running):
            if job.started is not None and now - job.started > self.limit:
                self.running.remove(job)
                self._finish(job, TimedOut(f"no result after {self.limit:g} seconds"))
                self.hung += 1
                self.hanging += 1
                self._alive -= 1
                self._hire()

    def _finish(self, job: _Job, outcome: Any) -> None:
        job.outcome, job.done = outcome, True
        if not job.private:
            self.finished.append(job)
        self.changed.notify_all()

    def _next(self) -> _Job | None:
        """Remove and return the first waiting job that may run; None if there is none."""
        busy = any(job.serial for job in self.running)
        job = next((job for job in self.waiting if not (busy and job.serial)), None)
        if job is not None:
            self.waiting.remove(job)
        return job

    def _work(self) -> None:
        while True:
            with self.changed:
                while (job := self._next()) is None:
                    if self.closed:
                        return
                    self.changed.wait()
                job.started = time.monotonic()
                self.running.append(job)
                self.changed.notify_all()
            outcome = job.run()
            with self.changed:
                if job.done:  # it was abandoned, and another thread has replaced this one
                    self.hanging -= 1
                    return
                self.running.remove(job)
                self._finish(job, outcome)
            del outcome  # an idle thread keeps nothing alive, the pool least of all


class StepPool:
    """Pool of daemon threads that runs calls with a time limit for each call.

    A thread cannot be stopped. If a call exceeds the limit while a caller waits for an outcome, its
    thread is abandoned and replaced. The abandoned call keeps running in parallel with later calls,
    but nothing waits for it, not even the end of the process. Threads start when there are calls,
    and end when the pool is closed or garbage-collected.

    Args:
        threads: Maximum number of calls that run at the same time, abandoned calls not counted.
        limit_s: Number of seconds after which a running call is abandoned.

    Raises:
        ValueError: `threads` is below 1, or `limit_s` is not above 0.
    """

    def __init__(self, threads: int = 8, limit_s: float = 30.0):
        if threads < 1:
            raise ValueError(f"threads={threads}: choose 1 or more")
        if not isinstance(limit_s, (int, float)) or not limit_s > 0:
            raise ValueError(f"limit_s={limit_s}: choose a number of seconds above 0")
        self._workers = _Workers(threads, limit_s)
        self._end = weakref.finalize(self, self._workers.close)
        self._end.atexit = False

    @property
    def hung(self) -> int:
        """Number of calls that were abandoned so far."""
        return self._workers.hung

    @property
    def hanging(self) -> int:
        """Number of abandoned calls that are still running; each occupies a thread."""
        return self._workers.hanging

    @property
    def closed(self) -> bool:
        """Whether the pool was closed and accepts no more calls."""
        return self._workers.closed

    def submit(self, key: Hashable, call: Callable[[], Any], serial: bool = False) -> None:
        """Schedule a call for the next free thread, and return without waiting for the call.

        Args:
            key: Key under which `ready` returns the outcome of the call.
            call: Function without arguments.
            serial: Whether the call must not run at the same time as another serial call of this
                pool. The time that a call waits does not count towards the limit.

        Raises:
            PoolClosed: The pool is closed; a subclass of `ValueError`.
        """
        self._workers.put(_Job(key, call, serial))

    def ready(self, least: int = 1) -> list[tuple[Hashable, Any]]:
        """Wait for submitted calls to finish, and return the outcomes of all finished calls.

        Args:
            least: Number of outcomes to wait for. If fewer calls were submitted, this method waits
                for all of them.

        Returns:
            Pairs of key and outcome in the order in which the calls ended. An outcome is the call's
            result, the exception that it raised, a `TimedOut`, or a `PoolClosed` for a call that
            had not started when the pool was closed.
        """
        workers = self._workers

        def enough() -> bool:
            under_way = any(not job.private for job in (*workers.waiting, *workers.running))
            return len(workers.finished) >= least or not under_way

        with workers.changed:
            workers.wait(enough)
            found, workers.finished = workers.finished, []
        return [(job.key, job.outcome) for job in found]

    def call(self, call: Callable[[], Any]) -> Any:
        """Run a call and wait for its result, which `ready` does not return.

        Args:
            call: Function without arguments.

        Raises:
            TimedOut: The call took longer than the limit.
            PoolClosed: The pool is closed; a subclass of `ValueError`.
            Exception: Any exception that the call raises.
        """
        job = _Job(None, call, private=True)
        self._workers.put(job)
        with self._workers.changed:
            self._workers.wait(lambda: job.done)
        if isinstance(job.outcome, BaseException):
            raise job.outcome
        return job.outcome

    def close(self) -> None:
        """Close the pool: waiting calls get `PoolClosed`, threads end after their current call."""
        self._end()


@dataclasses.dataclass(frozen=True)
class FailedState:
    """State of an episode that failed.

    Attributes:
        counter: Name of the counter of the failure, such as `timeouts`.
        error: Reason of the failure.
        over: Whether the failed last turn was already returned. False after a failed reset: the
            first step then returns the failed turn.
    """

    counter: str
    error: str = dataclasses.field(default="", compare=False, repr=False)
    over: bool = True


@dataclasses.dataclass(frozen=True)
class TimeLimited(EnvironmentWrapper):
    """Wrapper of an environment whose errors and hanging calls end the episode, not the run.

    A step or a reset that takes longer than the limit makes its episode a failure, counted as
    `timeouts`. Other failures are counted as in `counted_step`. A failed reset is reported by the
    first step after it. An abandoned call keeps running in parallel with later calls, so an
    environment whose steps change shared state (a server, the process's random generators) must
    itself limit the time of its steps.

    Attributes:
        environment: Environment to wrap; other wrappers belong inside this one.
        limit_s: Number of seconds after which a step, a reset or the making of a problem is
            abandoned. None sets no limit and calls the environment on the caller's thread.

    Raises:
        ValueError: `limit_s` is not above 0.
    """

    limit_s: float | None = 30.0

    def __post_init__(self):
        pool = None if self.limit_s is None else StepPool(1, self.limit_s)
        object.__setattr__(self, "_pool", pool)
        object.__setattr__(self, "_cuts", [])

    @property
    def _reasons(self) -> list[str]:
        """Reasons of the timeouts since the last step that did not time out."""
        return self.__dict__["_cuts"]

    def raise_if_hanging(self) -> None:
        """Raise a `ValueError` after 8 timeouts in a row, or if 64 abandoned calls still run."""
        pool: StepPool | None = self.__dict__["_pool"]
        if pool is not None and pool.hanging >= _MOST_HANGING:
            raise ValueError(
                f"{self.name} hangs: {pool.hanging} calls were cut and have not ended since: mend "
                "it, or choose a larger limit, in `rl` by --environment-limit-s 300"
            )
        if len(self._reasons) >= _MOST_CUT:
            raise ValueError(
                f"{self.name} hangs: {len(self._reasons)} calls in a row gave {self._reasons[-1]}: "
                "mend it, or choose a larger limit, in `rl` by --environment-limit-s 300"
            )

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem of the environment.

        Raises:
            ValueError: Making the problem took longer than the limit.
        """
        try:
            return self._call(lambda: self.environment.problem(split, index))
        except TimedOut as error:
            raise ValueError(
                f"{self.name}: problem {index} of {split}: {error}: choose a larger limit_s"
            ) from None

    def reset(self, problem: Problem) -> Any:
        """Return the first state of an episode, or a `FailedState` if the reset fails."""
        try:
            return self._call(lambda: self.environment.reset(problem))
        except (Exception, SystemExit) as error:
            if isinstance(error, TimedOut):
                self._reasons.append(str(error))
            return FailedState(counter_of(error), reason_of(error), over=False)

    def step(self, state: Any, action: Completion) -> Turn:
        """Return the turn after an action: a failed last turn if the step or the reset failed.

        Raises:
            ValueError: A failed last turn was already returned for this episode.
        """
        if isinstance(state, FailedState):
            if state.over:
                raise ValueError(f"{self.name}: the episode is over: reset before the next step")
            return self._failed(state.counter, state.error)
        try:
            turn = self._call(lambda: counted_step(self.environment, action.problem, state, action))
        except TimedOut as error:
            turn = self._failed("timeouts", str(error))
        # An environment with its own time limit may count `timeouts`, too.
        if turn.terminated and turn.error and turn.info.get("timeouts"):
            self._reasons.append(turn.error)
        else:
            self._reasons.clear()
        return turn

    def _failed(self, counter: str, error: str) -> Turn:
        return failed_turn(self, FailedState(counter, error), counter, error)

    def _call(self, call: Callable[[], Any]) -> Any:
        pool: StepPool | None = self.__dict__["_pool"]
        return call() if pool is None else pool.call(call)


class TimeLimits:
    """Registry of one `TimeLimited` wrapper per environment, which counts timeouts over a run.

    Args:
        limit_s: Number of seconds after which a call of an environment is abandoned; None for no
            limit.
    """

    def __init__(self, limit_s: float | None):
        self._limit_s = limit_s
        self._made: list[TimeLimited] = []

    def of(self, environment: Environment) -> TimeLimited:
        """Return the `TimeLimited` wrapper of an environment, the same wrapper in every call."""
        for made in self._made:
            if made.environment is environment:
                return made
        self._made.append(TimeLimited(environment, self._limit_s))
        return self._made[-1]
