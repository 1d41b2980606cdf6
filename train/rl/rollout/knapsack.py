"""Knapsack RL: allocating a step's rollouts to the most informative problems (arXiv 2509.25849).

Everything is computed on the host in float64: for success rates near 0 and 1, float32 is too
coarse.
"""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.9
"""Probability of mixed outcomes at which the number of rollouts of `demand` aims."""


def mixed_probability(count: np.ndarray | float, rate: np.ndarray | float) -> np.ndarray:
    """Probability that a group has both successes and failures: 1 - p^N - (1-p)^N.

    Args:
        count: Number of rollouts of the group (N), any shape.
        rate: Success rate of a rollout (p), a shape that broadcasts with that of `count`.

    Returns:
        Array of the broadcast shape, float64.
    """
    rate = np.asarray(rate, np.float64)
    return 1.0 - rate**count - (1.0 - rate) ** count


def information_gain(rate: np.ndarray | float) -> np.ndarray:
    """First-order gain of the success rate p by an update: p (1-p)^2, maximal at p = 1/3."""
    rate = np.asarray(rate, np.float64)
    return rate * (1.0 - rate) ** 2


def value(count: np.ndarray | float, rate: np.ndarray | float) -> np.ndarray:
    """Value of a group, V(N, p) = (1 - p^N - (1-p)^N) p (1-p)^2.

    Args:
        count: Number of rollouts of the group (N), any shape.
        rate: Success rate of a rollout (p), a shape that broadcasts with that of `count`.

    Returns:
        Array of the broadcast shape, float64.
    """
    return mixed_probability(count, rate) * information_gain(rate)


def demand(rate: float, high: int) -> int:
    """Estimate how many rollouts make a mixed group with probability `CONFIDENCE`.

    The estimate is ln(1 - `CONFIDENCE`) / ln(max(p, 1-p)), rounded down, and at most `high`.

    Args:
        rate: Success rate (p), above 0 and below 1.
        high: Maximum number of rollouts of a problem.
    """
    return math.floor(min(high, math.log(1 - CONFIDENCE) / math.log(max(rate, 1 - rate))))


def allocate(rates: Sequence[float], total: int, low: int, high: int) -> np.ndarray:
    """Compute exactly the numbers of rollouts that maximise the sum of the problems' values.

    The marginal value of a rollout, V(N+1, p) - V(N, p) = p (1-p)^2 (p^N (1-p) + (1-p)^N p),
    decreases in N, so taking the largest marginal values over all problems is optimal.

    Args:
        rates: Success rates of `M` problems.
        total: Number of rollouts to distribute, all of which are spent.
        low: Minimum number of rollouts of a problem, 1 or more.
        high: Maximum number of rollouts of a problem.

    Returns:
        Number of rollouts of each problem, `[M]` int.

    Raises:
        ValueError: `low` is below 1 or above `high`, or `total` is not from `M low` to `M high`.
    """
    rate = np.asarray(rates, np.float64)[:, None]
    if not 1 <= low <= high or not low * len(rate) <= total <= high * len(rate):
        raise ValueError(
            f"{total} rollouts of {len(rate)} problems, from {low} to {high} each: "
            f"choose a total from {low * len(rate)} to {high * len(rate)}"
        )
    count = np.arange(low, high)
    marginal = information_gain(rate) * (rate**count * (1 - rate) + (1 - rate) ** count * rate)
    best = np.argsort(-marginal, axis=None, kind="stable")[: total - low * len(rate)]
    # Marginal values of a row decrease, so it is enough to count the chosen ones.
    return low + np.bincount(best // max(high - low, 1), minlength=len(rate))


def plan(rates: Sequence[float | None], shares: Sequence[int], low: int, high: int) -> list[int]:
    """Distribute the rollouts of a step among its problems.

    A problem of unknown success rate gets its uniform share, each other problem `low` rollouts. The
    remaining rollouts go first to problems with a rate between 0 and 1, up to the sum of their
    demands (`demand`). Rollouts that are still left go evenly to problems that never succeeded; if
    there are no such problems, to problems that always succeeded. Rollouts that exceed `high` there
    go to the other problems of known rate. Finally `allocate` redistributes the rollouts of the
    problems with a rate between 0 and 1.

    Args:
        rates: Estimated success rate of each problem; None if it is not known.
        shares: Number of rollouts of each problem in a uniform allocation, from `low` to `high`.
        low: Minimum number of rollouts of a problem.
        high: Maximum number of rollouts of a problem.

    Returns:
        Number of rollouts of each problem; their sum is that of `shares`.
    """
    counts = list(shares)
    known = {index: rate for index, rate in enumerate(rates) if rate is not None}
    never = [index for index, rate in known.items() if rate <= 0]
    always = [index for index, rate in known.items() if rate >= 1]
    inside = [index for index, rate in known.items() if 0 < rate < 1]
    left = sum(shares[index] for index in known) - low * len(known)
    needed = sum(demand(known[index], high) for index in inside)
    extra = dict.fromkeys(known, 0)

    def give(problems: list[int], most: int) -> None:
        """Distribute up to `most` of the remaining rollouts evenly; the first get one more."""
        nonlocal left
        capacity = sum(high - low - extra[index] for index in problems)
        given = min(left, most, capacity)
        left -= given
        each, more = divmod(given, max(len(problems), 1))
        for number, index in enumerate(problems):
            extra[index] += each + (number < more)

    # Problems of a class have equal counts, so `give` exceeds no problem's bound.
    give(inside, needed)
    for problems in (never, inside, always) if never else (always, inside):
        give(problems, left)
    for index in known:
        counts[index] = low + extra[index]
    if inside:
        spent = sum(counts[index] for index in inside)
        best = allocate([known[index] for index in inside], spent, low, high)
        for index, count in zip(inside, best.tolist(), strict=True):
            counts[index] = count
    return counts
