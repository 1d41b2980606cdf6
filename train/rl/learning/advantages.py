"""Advantage functions on arrays: rewards compared within groups, or over the batch.

Advantages are computed on the host in float64, over all groups of a step, before rows are split
into minibatches. Group ids are arbitrary integers, and groups may have any sizes. Rows that are not
`valid` are padding: their values may be anything, including NaN, their advantage is 0, and they do
not change other rows.

In `grpo`, `dr_grpo`, `rloo` and `reinforce_pp_baseline`, a row that is alone in its group gets
exactly 0, and so do all rows of a group with equal rewards. (In some other implementations a lone
row keeps its reward as its advantage, which reinforces whatever was sampled only once.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class _Groups(NamedTuple):
    """The `n` valid rows among `K` rows, with statistics of their groups.

    Attributes:
        rows: Indices of the valid rows, `[n]`.
        index: Group of each valid row, renumbered from 0, `[n]`.
        size: Number of valid rows in the group of each valid row, `[n]` float64.
        deviation: Reward minus the mean reward of the group, `[n]`.
    """

    rows: np.ndarray
    index: np.ndarray
    size: np.ndarray
    deviation: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Average values `[n]` over each row's group, `[n]`."""
        return np.bincount(self.index, weights=values)[self.index] / self.size

    def spread(self, values: np.ndarray, total: int) -> np.ndarray:
        """Scatter values `[n]` of valid rows to all `total` rows, `[K]`; 0 for invalid rows."""
        found = np.zeros(total)
        found[self.rows] = values
        return found


def _grouped(reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> _Groups:
    shapes = {"reward": np.shape(reward), "group": np.shape(group), "valid": np.shape(valid)}
    if len(set(shapes.values())) > 1 or len(shapes["reward"]) != 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected [K] for each, got {listed}")
    rows = np.flatnonzero(valid)
    values = np.asarray(reward, np.float64)[rows]
    if not np.isfinite(values).all():
        row = rows[~np.isfinite(values)][0]
        raise ValueError(f"the reward of row {row} is {reward[row]}: mark the row as not valid")
    _, first, index, counts = np.unique(
        np.asarray(group)[rows], return_index=True, return_inverse=True, return_counts=True
    )
    # Relative to a reward of the group, equal rewards are exactly 0, and so is their mean.
    values = values - values[first][index]
    groups = _Groups(rows, index, counts[index].astype(np.float64), values)
    return groups._replace(deviation=values - groups.mean(values))


def _scaled(values: np.ndarray, std: np.ndarray, eps: float) -> np.ndarray:
    """Divide values by `std + eps`; the result is 0 where `std` is 0, for any `eps`."""
    return np.divide(values, std + eps, out=np.zeros_like(values), where=std > 0)


def grpo(
    reward: np.ndarray, group: np.ndarray, valid: np.ndarray, eps: float = 1e-6, ddof: int = 1
) -> np.ndarray:
    """Compute GRPO advantages: (R - mean) / (std + eps), with mean and std of the group.

    Args:
        reward: Reward R of each of `K` rows, `[K]`.
        group: Id of the group of each row, `[K]` int.
        valid: Rows that are not padding, `[K]` bool.
        eps: Constant added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation: 1 for the sample standard
            deviation, as in common trainers, 0 for the population standard deviation.

    Returns:
        Advantages, `[K]` float64.

    Raises:
        ValueError: The shapes differ or are not `[K]`, or the reward of a valid row is not finite.
    """
    groups = _grouped(reward, group, valid)
    variance = groups.mean(groups.deviation**2)
    variance *= groups.size / np.maximum(groups.size - ddof, 1)
    return groups.spread(_scaled(groups.deviation, np.sqrt(variance), eps), len(reward))


def dr_grpo(reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Compute Dr. GRPO advantages: reward minus mean reward of the group.

    Arguments and result are as in `grpo`.
    """
    groups = _grouped(reward, group, valid)
    return groups.spread(groups.deviation, len(reward))


def rloo(reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Compute RLOO advantages: reward minus mean reward of the other rows of the group.

    Arguments and result are as in `grpo`.
    """
    groups = _grouped(reward, group, valid)
    scale = groups.size / np.maximum(groups.size - 1, 1)
    return groups.spread(scale * groups.deviation, len(reward))


def reinforce_pp_baseline(
    reward: np.ndarray, group: np.ndarray, valid: np.ndarray, eps: float = 1e-6
) -> np.ndarray:
    """Compute REINFORCE++ advantages with a baseline: D / (std(D) + eps), where D = R - group mean.

    The standard deviation std(D) is over all valid rows of the batch. The mean of D over the batch
    is 0 and need not be subtracted. The population standard deviation is used, which gives the
    advantages 1.732 and -0.577 of the method's specification. (One trainer uses the sample standard
    deviation, but over all tokens of a batch, where the two hardly differ.)

    Args:
        reward: Reward R of each of `K` rows, `[K]`, of groups that dynamic sampling has kept.
        group: Id of the group of each row, `[K]` int.
        valid: Rows that are not padding, `[K]` bool.
        eps: Constant added to the standard deviation.

    Returns:
        Advantages, `[K]` float64.
    """
    groups = _grouped(reward, group, valid)
    variance = np.sum(groups.deviation**2) / max(len(groups.rows), 1)
    return groups.spread(_scaled(groups.deviation, np.sqrt(variance), eps), len(reward))


def rebn(returns: np.ndarray, eps: float = 1e-9) -> np.ndarray:
    """Normalise returns (ReBN): (G - mean) / (std + eps) over all turns of a batch.

    Args:
        returns: Discounted return G of each turn of each episode, `[N]`, where `N` is the total
            number of turns.
        eps: Constant added to the population standard deviation.

    Returns:
        Advantages, `[N]` float64.
    """
    return whiten(returns, eps)


def whiten(values: np.ndarray, eps: float = 1e-9) -> np.ndarray:
    """Normalise the values of a batch to mean 0 and population standard deviation 1.

    Args:
        values: The `N` values of the batch, `[N]`.
        eps: Constant added to the standard deviation.

    Returns:
        Normalised values, `[N]` float64; 0 where all values are equal.
    """
    # All values are one group: its mean and standard deviation are those of the batch.
    everyone = np.zeros(np.shape(values), int)
    return grpo(values, everyone, everyone == 0, eps, ddof=0)


def gae(reward: np.ndarray, value: np.ndarray, discount: np.ndarray, lam: float) -> np.ndarray:
    """Compute generalised advantage estimates (arXiv 1506.02438, eq. 16) of `N` episodes.

    δ_t = r_t + γ_t V_{t+1} - V_t and A_t = δ_t + γ_t λ A_{t+1}, with V = A = 0 after the last step.

    Args:
        reward: Reward after each of `T` steps, `[N, T]` float64; 0 in padding, which is on the
            right.
        value: Value of the state before each step, `[N, T]` float64; 0 in padding.
        discount: Discount γ_t of rewards after each step, `[N, T]`; any finite number in padding.
        lam: Decay of later TD errors (λ): 0 gives one-step TD errors, 1 gives returns minus values.

    Returns:
        Advantages, `[N, T]` float64; 0 in padding.
    """
    found = np.zeros(value.shape)
    next_value = later = np.zeros(len(value))
    for step in reversed(range(value.shape[1])):
        error = reward[:, step] + discount[:, step] * next_value - value[:, step]
        found[:, step] = later = error + discount[:, step] * lam * later
        next_value = value[:, step]
    return found


def discounted_returns(rewards: Sequence[float], gamma: float) -> np.ndarray:
    """Compute the discounted return of each turn of an episode.

    G_t is the sum over k >= t of gamma^(k-t) r_k.

    Args:
        rewards: Reward of each of the `T` turns.
        gamma: Discount of the rewards of later turns, from 0 to 1.

    Returns:
        Discounted returns, `[T]` float64.

    Raises:
        ValueError: `gamma` is not from 0 to 1.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: choose a discount from 0 to 1")
    found = np.zeros(len(rewards))
    later = 0.0
    for turn in reversed(range(len(rewards))):
        found[turn] = later = rewards[turn] + gamma * later
    return found


def in_mixed_group(verdict: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Select the rows that dynamic sampling (DAPO) keeps: rows of groups whose verdicts differ.

    Args:
        verdict: Verdict of the verifier on each of `K` rows, `[K]`: 0 or 1, or more values where an
            answer may also abstain. Rewards are not used, since penalties make rewards differ.
        group: Id of the group of each row, `[K]` int.
        valid: Rows that are not padding, `[K]` bool.

    Returns:
        Kept rows, `[K]` bool; False for rows alone in their group.
    """
    groups = _grouped(verdict, group, valid)
    return groups.spread(groups.mean(groups.deviation**2) != 0, len(verdict)).astype(bool)
