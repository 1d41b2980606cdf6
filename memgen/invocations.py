"""Penalty on a trigger's reward for invoking the weaver too often (arXiv 2509.24704)."""

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
    """Compute the penalty λ Σ_j max(0, d_j - p̄) of each trajectory (arXiv 2509.24704).

    Subtract the penalty from the reward before rewards are normalised by group. The sum is over the
    decisions d_j of the trajectory, each 0 (skipped) or 1 (invoked), so the sum is (1 - p̄) times
    the number of invocations. p̄ is the mean invocation rate of the good trajectories, which are
    those with at least the median reward.

    A trajectory without decisions has penalty 0, but its reward counts in the median. With the rate
    "decisions", such a trajectory has no rate and does not enter the mean p̄; with the rate
    "tokens", its rate is 0. If no good trajectory has a decision, p̄ is 0.

    Args:
        decisions: `[K, L]` int, decisions of `K` trajectories at up to `L` tokens: -1 none,
            0 skipped, 1 invoked.
        reward: Reward of each trajectory before any penalty, `[K]`.
        length: Number of tokens of each trajectory, `[K]`; used only with the rate "tokens".
        group: Integer that identifies the group of each trajectory, `[K]`.
        valid: Whether a row is a trajectory and not padding, `[K]` bool. A padding row has penalty
            0 and no influence on other rows.
        weight: Weight of the penalty (λ). The paper gives no value; 0.01 to 0.3 is sensible with
            rewards of 0 and 1.
        rate: Denominator of the invocation rate: the number of "decisions" of a trajectory (the
            paper's second version) or its number of "tokens" (the first version).
        scope: Set of trajectories over which median and mean are taken: the "group" (the paper's
            second version) or the whole "batch" (the first version).

    Returns:
        Penalties, `[K]` float64.

    Raises:
        ValueError: `rate` or `scope` is unknown, the shapes do not fit each other, or a valid row
            has a non-finite reward, a decision other than -1, 0 and 1, or (with the rate "tokens")
            a length that is not above 0.
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
    """Return the median of each group; for an even number of values, the mean of the middle two."""
    order = np.lexsort((values, index))
    size = np.bincount(index)
    start = np.cumsum(size) - size
    low, high = order[start + (size - 1) // 2], order[start + size // 2]
    return (values[low] + values[high]) / 2
