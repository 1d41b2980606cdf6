"""The price of invoking the weaver, which a trigger's reward pays (arXiv 2509.24704)."""

from typing import Literal, get_args

import numpy as np

Rate = Literal["decisions", "tokens"]
Scope = Literal["group", "batch"]


def invocation_penalty(
    decisions: np.ndarray,
    reward: np.ndarray,
    length: np.ndarray,
    group: np.ndarray,
    valid: np.ndarray,
    *,
    weight: float,
    rate: Rate = "decisions",
    scope: Scope = "group",
) -> np.ndarray:
    """λ Σ_j max(0, d_j - p̄), to be subtracted from the reward before groups are normalised.

    The price of invocations that good trajectories do without (arXiv 2509.24704).

    p̄ is the mean rate of invocation of good trajectories, those whose reward is at least the
    median. As d_j is 0 or 1, the sum is (1 - p̄) times the number of invocations.

    A trajectory without decisions pays nothing. Its reward counts in the median, but it has no
    rate per decision, so it stays out of that mean; by tokens its rate is 0. Where no good
    trajectory has a decision, p̄ is 0.

    Args:
        decisions: Decisions of each trajectory, `[K, L]` int: -1 none was made, 0 skipped, 1
            invoked.
        reward: Reward of each trajectory before any penalty, `[K]`.
        length: Number of tokens of each trajectory, `[K]`; used where the rate is by tokens.
        group: Group of each trajectory, `[K]` int, arbitrary.
        valid: Rows that are no padding, `[K]` bool; others pay nothing and change nothing.
        weight: Weight of the penalty (λ). The paper gives no value; 0.01 to 0.3 is sensible with
            rewards of 0 and 1.
        rate: Unit that the rate of invocation is counted by: "decisions" of the trigger (the
            paper's second version) or all "tokens" of a trajectory (its first version).
        scope: Trajectories that are compared: those of a "group" (second version) or of the whole
            "batch" (first version).

    Returns:
        Penalties, `[K]` float64.

    Raises:
        ValueError: A choice is unknown, the shapes do not fit each other, or a valid row holds no
            possible values.
    """
    for name, value, choices in (("rate", rate, get_args(Rate)), ("scope", scope, get_args(Scope))):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose {' or '.join(choices)}")
    beside = {"reward": reward, "length": length, "group": group, "valid": valid}
    shapes = {name: np.shape(values) for name, values in beside.items()}
    if np.ndim(decisions) != 2 or set(shapes.values()) != {np.shape(decisions)[:1]}:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"beside decisions {list(np.shape(decisions))} [K, L], got {listed}")
    rows = np.flatnonzero(valid)
    decisions = np.asarray(decisions)[rows]
    reward = np.asarray(reward, np.float64)[rows]
    group = np.asarray(group)[rows] if scope == "group" else np.zeros(len(rows), int)
    _refuse(rows, ~np.isfinite(reward), "has no finite reward")
    known = np.isin(decisions, (-1, 0, 1))
    _refuse(rows, ~np.all(known, axis=1), "has decisions besides -1, 0, 1")

    _, index = np.unique(group, return_inverse=True)
    invoked = (decisions == 1).sum(axis=1)
    if rate == "tokens":
        units = np.asarray(length, np.float64)[rows]
        _refuse(rows, ~(units > 0), "has no length to count invocations by")
    else:
        units = (decisions >= 0).sum(axis=1)
    good = (reward >= _medians(reward, index)[index]) & (units > 0)
    rates = np.divide(invoked, units, out=np.zeros(len(rows)), where=good)
    mean = np.bincount(index, weights=rates) / np.maximum(np.bincount(index, weights=good), 1)
    penalty = np.zeros(len(valid))
    penalty[rows] = weight * invoked * np.maximum(0.0, 1.0 - mean[index])
    return penalty


def _refuse(rows: np.ndarray, bad: np.ndarray, why: str) -> None:
    if bad.any():
        raise ValueError(f"row {rows[bad][0]} {why}: mark it as not valid")


def _medians(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Median of each group, `[G]`; of an even number the mean of the middle two."""
    order = np.lexsort((values, index))
    size = np.bincount(index)
    start = np.cumsum(size) - size
    low, high = order[start + (size - 1) // 2], order[start + size // 2]
    return (values[low] + values[high]) / 2
