"""Knapsack RL: a step's rollouts go where a group is likely to teach most (arXiv 2509.25849).

All on the host, in float64: near rates of 0 and 1 float32 would decide by rounding.
"""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.9
"""Probability of a mixed group for which a problem's demand of rollouts is estimated."""


def mixed_probability(count: np.ndarray | float, rate: np.ndarray | float) -> np.ndarray:
    """Probability that a group of rollouts both succeeds and fails: 1 - p^N - (1-p)^N.

    Args:
        count: Number of rollouts of the group (N), any shape.
        rate: Success rate of a rollout (p), a shape that broadcasts with that of `count`.
    """
    rate = np.asarray(rate, np.float64)
    return 1.0 - rate**count - (1.0 - rate) ** count


def information_gain(rate: np.ndarray | float) -> np.ndarray:
    """First-order gain of the success rate from an update, p (1-p)^2: most at a third."""
    rate = np.asarray(rate, np.float64)
    return rate * (1.0 - rate) ** 2


def value(count: np.ndarray | float, rate: np.ndarray | float) -> np.ndarray:
    """Value of a group, V(N, p) = (1 - p^N - (1-p)^N) p (1-p)^2; arguments as above."""
    return mixed_probability(count, rate) * information_gain(rate)


def demand(rate: float, high: int) -> int:
    """Number of rollouts for a mixed group with probability `CONFIDENCE`, at most `high`.

    Args:
        rate: Success rate (p), between 0 and 1.
        high: Greatest number of rollouts of a problem.
    """
    return math.floor(min(high, math.log(1 - CONFIDENCE) / math.log(max(rate, 1 - rate))))


def allocate(rates: Sequence[float], total: int, low: int, high: int) -> np.ndarray:
    """Numbers of rollouts `[M]` that maximise the sum of values; exact.

    The marginal value of a rollout, V(N+1, p) - V(N, p) = p (1-p)^2 (p^N (1-p) + (1-p)^N p), falls
    in N, so the largest marginals of all problems are the optimum.

    Args:
        rates: Success rates, `M` of them.
        total: Number of rollouts to distribute, all of which are spent.
        low: Least number of rollouts of a problem, 1 or more.
        high: Greatest number of rollouts of a problem.

    Raises:
        ValueError: The bounds don't admit the total.
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
    # A row's marginals fall, so how many of them are chosen says which.
    return low + np.bincount(best // max(high - low, 1), minlength=len(rate))


def plan(rates: Sequence[float | None], shares: Sequence[int], low: int, high: int) -> list[int]:
    """Numbers of rollouts of a step's problems, together as many as their shares.

    Problems of unknown rate keep their share. Of the others, those that sometimes succeed get what
    their demand is estimated at, distributed by `allocate`; if rollouts are left over then, they go
    evenly to problems that never succeeded, or to those that always did where there are none of
    these. A problem that reaches `high` passes on what it is too many.

    Args:
        rates: Estimated success rate of each problem; None where it is not known.
        shares: Number of rollouts of each problem if all got the same, from `low` to `high`.
        low: Least number of rollouts of a problem.
        high: Greatest number of rollouts of a problem, fallback included.
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
        """Give up to `most` of what is left evenly to problems, the first ones the remainder."""
        nonlocal left
        capacity = sum(high - low - extra[index] for index in problems)
        given = min(left, most, capacity)
        left -= given
        each, more = divmod(given, max(len(problems), 1))
        for number, index in enumerate(problems):
            extra[index] += each + (number < more)

    # Within a class all have the same number, so `give` to it exceeds nobody's bound.
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
