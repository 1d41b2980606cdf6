"""Advantage functions on arrays: rewards compared within groups, or over the batch.

Advantages are computed on the host in float64, over the complete set of groups, before it is cut
into minibatches. Groups are named by arbitrary integers and may be of any sizes. Rows that are not
`valid` are padding: whatever they hold, NaN too, they get 0 and change nothing.

A row that is alone in its group has nothing to be compared with and gets 0, as have all rows of a
group that did equally well: exactly 0, free of rounding. (Elsewhere a lone row keeps its reward as
its advantage, which praises whatever was drawn only once.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class _Groups(NamedTuple):
    """The `n` valid rows of `K`.

    Attributes:
        rows: Indices of the valid rows, `[n]`.
        index: Group of each row, counted from 0, `[n]`.
        size: Number of rows of each row's group, `[n]` float64.
        deviation: Reward minus the mean of the group, `[n]`.
    """

    rows: np.ndarray
    index: np.ndarray
    size: np.ndarray
    deviation: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean over each row's group, `[n]`."""
        return np.bincount(self.index, weights=values)[self.index] / self.size

    def spread(self, values: np.ndarray, total: int) -> np.ndarray:
        """Values of valid rows, 0 elsewhere, `[K]`."""
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
    """Values over `std + eps`; 0 where nothing varies, for any `eps`."""
    return np.divide(values, std + eps, out=np.zeros_like(values), where=std > 0)


def grpo(
    reward: np.ndarray, group: np.ndarray, valid: np.ndarray, eps: float = 1e-6, ddof: int = 1
) -> np.ndarray:
    """GRPO: (R - mean) / (std + eps) with the group's statistics.

    Args:
        reward: Reward of each row, `[K]`.
        group: Group of each row, `[K]` int.
        valid: Rows that are no padding, `[K]` bool.
        eps: Constant added to the standard deviation.
        ddof: Delta degrees of freedom of the standard deviation: 1 for that of a sample, as common
            trainers have it, 0 for that of a population.

    Returns:
        Advantages, `[K]` float64.
    """
    groups = _grouped(reward, group, valid)
    variance = groups.mean(groups.deviation**2)
    variance *= groups.size / np.maximum(groups.size - ddof, 1)
    return groups.spread(_scaled(groups.deviation, np.sqrt(variance), eps), len(reward))


def dr_grpo(reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Dr. GRPO: R - mean of the group, `[K]` float64; arguments as those of `grpo`."""
    groups = _grouped(reward, group, valid)
    return groups.spread(groups.deviation, len(reward))


def rloo(reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """RLOO: R - mean of the others in the group, `[K]` float64; arguments as those of `grpo`."""
    groups = _grouped(reward, group, valid)
    scale = groups.size / np.maximum(groups.size - 1, 1)
    return groups.spread(scale * groups.deviation, len(reward))


def reinforce_pp_baseline(
    reward: np.ndarray, group: np.ndarray, valid: np.ndarray, eps: float = 1e-6
) -> np.ndarray:
    """REINFORCE++ with a baseline: (R - group mean) over its standard deviation in the batch.

    The mean of the batch needs no subtraction, it is 0. The standard deviation is that of a
    population: the advantages 1.732 and -0.577 that the method is specified with. (One trainer
    takes that of a sample, but over all tokens of a batch, where both are the same.)

    Args:
        reward: Reward of each row, `[K]`, of groups that survived dynamic sampling.
        group: Group of each row, `[K]` int.
        valid: Rows that are no padding, `[K]` bool.
        eps: Constant added to the standard deviation.

    Returns:
        Advantages, `[K]` float64.
    """
    groups = _grouped(reward, group, valid)
    variance = np.sum(groups.deviation**2) / max(len(groups.rows), 1)
    return groups.spread(_scaled(groups.deviation, np.sqrt(variance), eps), len(reward))


def rebn(returns: np.ndarray, eps: float = 1e-9) -> np.ndarray:
    """Return batch normalisation: (G - mean) / (std + eps) over all turns of a batch.

    Args:
        returns: Discounted return of each turn of each episode, `[N]`.
        eps: Constant added to the standard deviation, which is that of a population.

    Returns:
        Advantages, `[N]` float64.
    """
    return whiten(returns, eps)


def whiten(values: np.ndarray, eps: float = 1e-9) -> np.ndarray:
    """Values `[N]` of a batch, brought to mean 0 and (population) standard deviation 1.

    Where nothing varies they become 0.
    """
    # All values are one group: its mean and standard deviation are those of the batch.
    everyone = np.zeros(np.shape(values), int)
    return grpo(values, everyone, everyone == 0, eps, ddof=0)


def gae(reward: np.ndarray, value: np.ndarray, discount: np.ndarray, lam: float) -> np.ndarray:
    """Generalised advantage estimation (arXiv 1506.02438), eq. 16, of `N` episodes.

    δ_t = r_t + γ_t V_{t+1} - V_t and A_t = δ_t + γ_t λ A_{t+1}, with V = A = 0 after the last step.

    Args:
        reward: Reward after each step, `[N, T]` float64; 0 in padding, which is on the right.
        value: Value before each step, `[N, T]` float64; 0 in padding.
        discount: Discount γ_t of what comes after each step, `[N, T]`; anything in padding.
        lam: Decay of later TD errors (λ): 0 for one step alone, 1 for returns minus values.

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
    """Returns G_t = sum over k >= t of gamma^(k-t) r_k of an episode's `T` turns, `[T]` float64."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: choose a discount from 0 to 1")
    found = np.zeros(len(rewards))
    later = 0.0
    for turn in reversed(range(len(rewards))):
        found[turn] = later = rewards[turn] + gamma * later
    return found


def in_mixed_group(verdict: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Rows that dynamic sampling keeps (DAPO): those of groups that both succeed and fail.

    Args:
        verdict: Verdict of the verifier on each row, `[K]`: 0 or 1, or more values where an answer
            may also abstain; not the reward, which penalties make vary.
        group: Group of each row, `[K]` int.
        valid: Rows that are no padding, `[K]` bool.

    Returns:
        Kept rows, `[K]` bool; False for rows alone in their group.
    """
    groups = _grouped(verdict, group, valid)
    return groups.spread(groups.mean(groups.deviation**2) != 0, len(verdict)).astype(bool)
