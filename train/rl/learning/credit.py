"""What each token of a batch of trajectories is to be praised or blamed for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl.learning import advantages as estimators
from train.rl.learning.penalties import invocation_penalty
from train.rl.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Trajectories by episode, `N` of them: one row each, or a row for each turn.

    Attributes:
        rows: of each episode, indices into the trajectories, in order.
        group: `[N]` int.
        reward: `[N]` float64 as it was given.
        success: `[N]` bool.
        length: `[N]` int, tokens that the policy wrote.
    """

    rows: list[list[int]]
    group: np.ndarray
    reward: np.ndarray
    success: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> "Episodes":
        found: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(trajectories):
            found.setdefault((row.group, row.episode), []).append(index)
        first = [trajectories[rows[0]] for rows in found.values()]
        written = [sum(trajectories[row].written for row in rows) for rows in found.values()]
        return cls(
            list(found.values()),
            np.array([row.group for row in first]),
            np.array([row.reward.value for row in first], np.float64),
            np.array([row.reward.success for row in first], bool),
            np.array(written),
        )

    @property
    def valid(self) -> np.ndarray:
        """`[N]` bool, all True: filler comes later."""
        return np.ones(len(self.rows), bool)


def assign_advantages(
    trajectories: Sequence[Trajectory], episodes: Episodes, config: Any
) -> list[np.ndarray]:
    """Advantages `[L]` float64 of each trajectory, by the method of the run.

    Args:
        trajectories: Rows that are trained on.
        episodes: The episodes that the rows are parts of.
        config: Config of the run (`RLConfig`).
    """
    reward = shaped_rewards(trajectories, episodes, config)
    return config.recipe.assign_advantages(trajectories, episodes, reward)


def shaped_rewards(
    trajectories: Sequence[Trajectory], episodes: Episodes, config: Any
) -> np.ndarray:
    """Rewards `[N]` float64 that advantages are made of, penalties taken off.

    Args:
        trajectories: Rows of the episodes.
        episodes: `N` episodes.
        config: Config of the run (`RLConfig`): its overlong penalty and its price of invocations.
    """
    value = episodes.reward.copy()
    if config.overlong_buffer:
        value += estimators.overlong_penalty(
            episodes.length, config.max_new_tokens, config.overlong_buffer, config.overlong_penalty
        )
    if config.penalty.weight:
        value -= invocation_penalty(
            config.penalty,
            _decisions(trajectories, episodes),
            episodes.reward,
            episodes.length,
            episodes.group,
            episodes.valid,
        )
    return value


def _decisions(trajectories: Sequence[Trajectory], episodes: Episodes) -> np.ndarray:
    """`[N, T]` int8, the decisions of each episode, -1 behind its end."""
    joined = [
        np.concatenate([trajectories[row].decisions for row in rows]) for rows in episodes.rows
    ]
    found = np.full((len(joined), max(map(len, joined))), -1, np.int8)
    for row, decisions in zip(found, joined, strict=True):
        row[: len(decisions)] = decisions
    return found


def spread_over_tokens(
    advantage: np.ndarray, trajectories: Sequence[Trajectory], episodes: Episodes
) -> list[np.ndarray]:
    """The advantage `[N]` of each episode as that of all tokens of its rows, `[L]` float64 each."""
    found = [np.zeros(0)] * len(trajectories)
    for rows, value in zip(episodes.rows, advantage, strict=True):
        for row in rows:
            found[row] = np.full(len(trajectories[row].tokens), value)
    return found


def turn_advantages(
    trajectories: Sequence[Trajectory], episodes: Episodes, gamma: float
) -> list[np.ndarray]:
    """Each turn's discounted return, normalised over all turns of the batch, for its tokens."""
    returns = [
        estimators.discounted_returns(trajectories[rows[0]].turn_rewards, gamma)
        for rows in episodes.rows
    ]
    pooled = estimators.rebn(np.concatenate(returns))
    ends = np.cumsum([len(turns) for turns in returns])
    found = [np.zeros(0)] * len(trajectories)
    for rows, turns, end in zip(episodes.rows, returns, ends, strict=True):
        normalised = pooled[end - len(turns) : end]
        for index in rows:
            row = trajectories[index]
            found[index] = np.zeros(len(row.tokens))
            for offset, begin in enumerate(row.begins):  # up to the next turn; only what is
                found[index][begin:] = normalised[row.turn + offset]  # trained counts
    return found
