"""What a trajectory pays for invoking memory: MemGen's reward-adaptive penalty."""

import dataclasses
from typing import Literal, get_args

import numpy as np

Rate = Literal["decisions", "tokens"]
Scope = Literal["group", "batch"]


@dataclasses.dataclass(frozen=True)
class InvocationPenalty:
    """The price of an invocation, less where good trajectories invoke often.

    Attributes:
        weight: Weight of the penalty (λ); 0 turns it off, as the authors' code does. The paper
            gives no value; 0.01 to 0.3 is sensible with rewards of 0 and 1.
        rate: Decisions that invocations are counted by: those that were asked for (the paper's
            second version) or all tokens of a trajectory (its first version).
        scope: Trajectories that are compared: those of a group (second version) or of the whole
            batch (first version).
    """

    weight: float = 0.0
    rate: Rate = "decisions"
    scope: Scope = "group"

    def __post_init__(self):
        if not 0 <= self.weight < np.inf:
            raise ValueError(f"weight={self.weight}: choose 0 or more, such as 0.1")
        if self.rate not in get_args(Rate):
            raise ValueError(f"rate={self.rate!r}: choose one of {', '.join(get_args(Rate))}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r}: choose one of {', '.join(get_args(Scope))}")


def invocation_penalty(
    config: InvocationPenalty,
    decisions: np.ndarray,
    reward: np.ndarray,
    length: np.ndarray,
    group: np.ndarray,
    valid: np.ndarray,
) -> np.ndarray:
    """λ Σ_j max(0, d_j - p̄), to be subtracted from the reward before groups are normalised.

    p̄ is the mean rate of invocation of good trajectories, those whose reward is at least the
    median. As d_j is 0 or 1, the sum is (1 - p̄) times the number of invocations.

    A trajectory that was never asked pays nothing. Its reward counts in the median, but it has no
    rate per decision, so it stays out of that mean; by tokens its rate is 0. Where no good
    trajectory was asked, nothing speaks for invoking and p̄ is 0.

    Args:
        config: price, rate, scope.
        decisions: `[K, L]` int: -1 not asked, 0 skipped, 1 invoked.
        reward: `[K]`, before any penalty.
        length: `[K]`, tokens of each trajectory; only read where the rate is by tokens.
        group: `[K]` int, arbitrary.
        valid: `[K]` bool; other rows are filler, which pay nothing and change nothing.

    Returns:
        `[K]` float64.
    """
    beside = {"reward": reward, "length": length, "group": group, "valid": valid}
    shapes = {name: np.shape(values) for name, values in beside.items()}
    if np.ndim(decisions) != 2 or set(shapes.values()) != {np.shape(decisions)[:1]}:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"beside decisions {list(np.shape(decisions))} [K, L], got {listed}")
    rows = np.flatnonzero(valid)
    decisions = np.asarray(decisions)[rows]
    reward = np.asarray(reward, np.float64)[rows]
    group = np.asarray(group)[rows] if config.scope == "group" else np.zeros(len(rows), int)
    _refuse(rows, ~np.isfinite(reward), "has no finite reward")
    known = np.isin(decisions, (-1, 0, 1))
    _refuse(rows, ~np.all(known, axis=1), "has decisions besides -1, 0, 1")

    _, index = np.unique(group, return_inverse=True)
    invoked = (decisions == 1).sum(axis=1)
    if config.rate == "tokens":
        units = np.asarray(length, np.float64)[rows]
        _refuse(rows, ~(units > 0), "has no length to count invocations by")
    else:
        units = (decisions >= 0).sum(axis=1)
    good = (reward >= _medians(reward, index)[index]) & (units > 0)
    rates = np.divide(invoked, units, out=np.zeros(len(rows)), where=good)
    mean = np.bincount(index, weights=rates) / np.maximum(np.bincount(index, weights=good), 1)
    penalty = np.zeros(len(valid))
    penalty[rows] = config.weight * invoked * np.maximum(0.0, 1.0 - mean[index])
    return penalty


def _refuse(rows: np.ndarray, bad: np.ndarray, why: str) -> None:
    if bad.any():
        raise ValueError(f"row {rows[bad][0]} {why}: mark it as not valid")


def _medians(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Of each group, `[G]`; of an even number the mean of the middle two."""
    order = np.lexsort((values, index))
    size = np.bincount(index)
    start = np.cumsum(size) - size
    low, high = order[start + (size - 1) // 2], order[start + size // 2]
    return (values[low] + values[high]) / 2
