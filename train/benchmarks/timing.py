"""Time functions by calling them in turns, and compare their times."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Cost(NamedTuple):
    """Cost of a piece of work.

    Attributes:
        seconds: Wall-clock time in seconds.
        cpu_seconds: CPU time of this process in seconds, summed over all cores.
    """

    seconds: float
    cpu_seconds: float

    def per(self, count: int) -> "Cost":
        """Divide the cost by `count`, for work that consists of `count` equal parts."""
        return Cost(self.seconds / count, self.cpu_seconds / count)


class Clock:
    """Stopwatch that starts when it is made; `read` returns the elapsed wall-clock and CPU time."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Cost:
        return Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def check_cpu() -> None:
    """Raise a ValueError if jax computes elsewhere, where CPU time says nothing."""
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"this benchmark compares CPU time, jax is on a {jax.default_backend()}: set "
            "JAX_PLATFORMS=cpu"
        )


def timed(function: Callable[..., Any], *args: Any) -> Cost:
    """Call a function, wait until the arrays of its result are computed, and return the cost."""
    clock = Clock()
    jax.block_until_ready(function(*args))
    return clock.read()


class Timing(NamedTuple):
    """Costs of one function's calls, one cost for each round."""

    rounds: Sequence[Cost]

    @property
    def best(self) -> Cost:
        """Smallest wall-clock and CPU time, which other work on the machine disturbs least."""
        return Cost(*map(min, zip(*self.rounds, strict=True)))

    @property
    def median(self) -> Cost:
        """Median wall-clock and CPU time."""
        return Cost(*map(float, np.median(np.array(self.rounds), axis=0)))


class Ratio(NamedTuple):
    """Ratio of two functions' wall-clock times.

    Attributes:
        best: Ratio of the smallest times.
        median: Ratio of the median times.
        low: Smallest ratio of the two times of one round.
        high: Largest ratio of the two times of one round.
    """

    best: float
    median: float
    low: float
    high: float


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """Compute the ratio of two timings from one `interleaved` call, with its spread over rounds."""
    pairs = zip(numerator.rounds, denominator.rounds, strict=True)
    of_rounds = [above.seconds / below.seconds for above, below in pairs]
    return Ratio(
        numerator.best.seconds / denominator.best.seconds,
        numerator.median.seconds / denominator.median.seconds,
        min(of_rounds),
        max(of_rounds),
    )


def interleaved(runs: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, Timing]:
    """Time functions in turns, so that changes of the machine's speed affect all functions alike.

    Args:
        runs: Mapping from names to functions that do their work once and return its cost. The first
            call of each function compiles and is not counted.
        rounds: Number of counted calls of each function.

    Returns:
        Mapping from names to timings.
    """
    for run in runs.values():
        run()
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            costs[name].append(run())
    return {name: Timing(found) for name, found in costs.items()}
