"""Steps of environments that cannot break a run: failures are counted, hanging ones are cut."""

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

_MOST_CUT = 8  # calls in a row before an environment is taken for one that hangs
_MOST_HANGING = 64  # threads that a run may lose to calls that do not end


class TimedOut(Exception):
    """A call took longer than the limit of its pool."""


class PoolClosed(ValueError):
    """A call was given to a pool that is closed, or waited in it when it was closed."""

    def __init__(self):
        super().__init__("the pool is closed and runs no more calls: make a new one")


def counted_step(
    environment: Environment, problem: Problem, state: Any, action: Completion
) -> Turn:
    """The environment's turn, or a failed last turn where there is none that can be learned from.

    A step that raises is counted as `scorer_errors`; one that gives no turn, or a reward or info
    that is not finite, as `invalid_turns`. The episode ends unsolved, worth the environment's
    `failure_value`, 0 where it has none; `Turn.error` says why.
    """
    try:
        return safe_step(environment, problem, state, action)
    except ValueError as error:
        return failed_turn(environment, state, "invalid_turns", str(error))


def failed_turn(environment: Any, state: Any, counter: str, error: str | BaseException) -> Turn:
    """A last turn of an episode that failed, with 1 in its info under the counter's name.

    Args:
        environment: Environment, whose `failure_value` is the reward; 0 where it has none.
        state: State that the turn ends in.
        counter: Name of the counter.
        error: Reason of the failure, or the exception, whose traceback is the reason.
    """
    value = float(getattr(environment, "failure_value", 0.0))
    reason = error if isinstance(error, str) else reason_of(error)
    return Turn(state, "", value, True, info={counter: 1.0}, error=reason)


def counter_of(error: BaseException) -> str:
    """Name that a failed call is counted by."""
    return "timeouts" if isinstance(error, TimedOut) else "scorer_errors"


def reason_of(error: BaseException) -> str:
    """Traceback of an exception; of a call that was cut its message alone."""
    return str(error) if isinstance(error, TimedOut) else "".join(traceback.format_exception(error))


@dataclasses.dataclass(eq=False)
class _Job:
    """A call of a pool; its outcome stays with it where one caller waits for it alone.

    It runs in the caller's context: context variables, and what NumPy does with errors.
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
        """What the call returns, or the exception that it raises."""
        try:
            return self.context.run(self.call)
        except SystemExit as error:  # of a grader that is a command, say: no end of the run
            return RuntimeError(f"the call ended by sys.exit({error.code})")
        except BaseException as error:  # whoever takes the outcome decides
            return error


class _Workers:
    """Threads of a pool and their jobs; they know nothing of the pool, which closes them.

    Args:
        threads: Greatest number of threads that can take a job.
        limit: Number of seconds after which a running job is cut.
    """

    def __init__(self, threads: int, limit: float):
        self.limit = limit
        self.changed = threading.Condition()
        self.waiting: collections.deque[_Job] = collections.deque()
        self.running: list[_Job] = []
        self.finished: list[_Job] = []
        self.closed = False
        self.hung = 0
        self.hanging = 0  # of them, those that have not ended since
        self._threads = threads
        self._alive = 0  # without those that hang

    def put(self, job: _Job) -> None:
        with self.changed:
            if self.closed:
                raise PoolClosed
            self.waiting.append(job)
            self._hire()
            self.changed.notify_all()

    def wait(self, enough: Callable[[], bool]) -> None:
        """Wait until there is enough, and cut what takes too long; `changed` is held."""
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
        """The first job that may run, or None where there is none."""
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
                if job.done:  # it was cut, and another thread has taken this one's position
                    self.hanging -= 1
                    return
                self.running.remove(job)
                self._finish(job, outcome)
            del outcome  # an idle thread keeps nothing alive, the pool least of all


class StepPool:
    """Daemon threads that run calls, each with a limit of time, and give results as they come.

    A thread cannot be stopped: one whose call takes too long is left alone and replaced, once
    somebody waits for an outcome. Nothing waits for it, at the end of the process neither, and its
    call goes on beside those that follow. Threads start when calls come, and end when the
    pool is closed or nobody has it any more.

    Args:
        threads: Greatest number of calls that run at a time.
        limit_s: Number of seconds after which a running call is cut.

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
        """Number of calls that were cut."""
        return self._workers.hung

    @property
    def hanging(self) -> int:
        """Number of calls that were cut and have not ended since; each keeps a thread."""
        return self._workers.hanging

    @property
    def closed(self) -> bool:
        """Whether the pool runs no more calls."""
        return self._workers.closed

    def submit(self, key: Hashable, call: Callable[[], Any], serial: bool = False) -> None:
        """Run a call as soon as a thread is free.

        Args:
            key: Key that `ready` gives its outcome under.
            call: Function without arguments.
            serial: Whether the call must not run beside another call of this pool that is serial.
                While it waits for one its time does not count.

        Raises:
            PoolClosed: The pool is closed; a `ValueError`.
        """
        self._workers.put(_Job(key, call, serial))

    def ready(self, least: int = 1) -> list[tuple[Hashable, Any]]:
        """Keys and outcomes of finished calls, in the order in which they ended.

        An outcome is what the call returned, or the exception that it raised, or `TimedOut`, or
        `PoolClosed` of a call that waited when the pool was closed.

        Args:
            least: Number of outcomes to wait for; all of them where fewer calls are under way.
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
        """Run a call and wait for its result, whatever other threads run on the pool.

        Args:
            call: Function without arguments.

        Raises:
            TimedOut: The call took longer than the limit.
            PoolClosed: The pool is closed; a `ValueError`.
            Exception: Whatever the call raises.
        """
        job = _Job(None, call, private=True)
        self._workers.put(job)
        with self._workers.changed:
            self._workers.wait(lambda: job.done)
        if isinstance(job.outcome, BaseException):
            raise job.outcome
        return job.outcome

    def close(self) -> None:
        """Let the threads end once they have nothing to do; calls that wait get `PoolClosed`."""
        self._end()


@dataclasses.dataclass(frozen=True)
class FailedState:
    """State of an episode that failed.

    Attributes:
        counter: Name that the failure is counted by.
        error: Reason of the failure.
        over: Whether its last turn was given; False after a reset that failed, which the first step
            counts.
    """

    counter: str
    error: str = dataclasses.field(default="", compare=False, repr=False)
    over: bool = True


@dataclasses.dataclass(frozen=True)
class TimeLimited(EnvironmentWrapper):
    """An environment whose steps cannot break or hold up a run, for strategies that step in order.

    A step or a reset that takes too long makes its episode a failure, counted as `timeouts`;
    failures of other kinds are counted as `counted_step` does. That of a reset is counted by the
    first step after it. A call that was cut goes on beside later ones, so an environment whose
    steps change what others share (a server, generators of the process) needs a limit of its own.

    Attributes:
        environment: Environment to wrap; other wrappers go inside.
        limit_s: Number of seconds after which a step, a reset or the making of a problem is cut.
            None has no limit and calls the environment on the caller's thread.
    """

    limit_s: float | None = 30.0

    def __post_init__(self):
        pool = None if self.limit_s is None else StepPool(1, self.limit_s)
        object.__setattr__(self, "_pool", pool)
        object.__setattr__(self, "_cuts", [])

    @property
    def _reasons(self) -> list[str]:
        """Why resets and steps were cut since the last step that was not."""
        return self.__dict__["_cuts"]

    def raise_if_hanging(self) -> None:
        """Raise a `ValueError` where the last eight resets and steps were cut, or 64 go on."""
        pool: StepPool | None = self.__dict__["_pool"]
        if pool is not None and pool.hanging >= _MOST_HANGING:
            raise ValueError(
                f"{self.name} hangs: {pool.hanging} calls were cut and have not ended since: mend "
                "it, or choose a larger limit, such as --environment-limit-s 300"
            )
        if len(self._reasons) >= _MOST_CUT:
            raise ValueError(
                f"{self.name} hangs: {len(self._reasons)} calls in a row gave {self._reasons[-1]}: "
                "mend it, or choose a larger limit, such as --environment-limit-s 300"
            )

    def problem(self, split: Split, index: int) -> Problem:
        """A problem of the environment.

        Raises:
            ValueError: It took too long.
        """
        try:
            return self._call(lambda: self.environment.problem(split, index))
        except TimedOut as error:
            raise ValueError(
                f"{self.name}: problem {index} of {split}: {error}: choose a larger limit_s"
            ) from None

    def reset(self, problem: Problem) -> Any:
        """First state of the episode of a problem; of one that failed where the reset does."""
        try:
            return self._call(lambda: self.environment.reset(problem))
        except Exception as error:
            if isinstance(error, TimedOut):
                self._reasons.append(str(error))
            return FailedState(counter_of(error), reason_of(error), over=False)

    def step(self, state: Any, action: Completion) -> Turn:
        """Turn after an action.

        Raises:
            ValueError: The episode has failed before.
        """
        if isinstance(state, FailedState):
            if state.over:
                raise ValueError(f"{self.name}: the episode is over: reset before the next step")
            return self._failed(state.counter, state.error)
        try:
            turn = self._call(lambda: counted_step(self.environment, action.problem, state, action))
        except TimedOut as error:
            turn = self._failed("timeouts", str(error))
        # An environment may have a limit of its own, too, and may count what it calls timeouts.
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
    """Time limits of the environments of a run, so that what hangs counts over all its steps.

    Args:
        limit_s: Limit of each environment, as of `TimeLimited`.
    """

    def __init__(self, limit_s: float | None):
        self._limit_s = limit_s
        self._made: list[TimeLimited] = []

    def of(self, environment: Environment) -> TimeLimited:
        """The environment with its limit; the same object each time."""
        for made in self._made:
            if made.environment is environment:
                return made
        self._made.append(TimeLimited(environment, self._limit_s))
        return self._made[-1]
