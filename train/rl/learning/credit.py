"""From rewards of episodes to advantages of tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl.learning import advantages as estimators
from train.rl.types import Episodes, Trajectory


def assign_advantages(
    trajectories: Sequence[Trajectory], episodes: Episodes, config: Any
) -> list[np.ndarray]:
    """Advantages `[L]` float64 of each trajectory, by the parts of a run; those of a strategy stay.

    Args:
        trajectories: Rows that are trained on.
        episodes: The episodes that the rows are parts of.
        config: Config of the run (`RLConfig`).
    """
    reward = shaped_rewards(trajectories, episodes, config)
    found = config.parts.advantage.of_tokens(trajectories, episodes, reward)
    bound = config.recipe.advantage_clip
    if bound is not None:
        found = [np.clip(advantage, -bound, bound) for advantage in found]
    own: list[Any] = [row.advantages for row in trajectories]
    return [mine if given is None else given for mine, given in zip(found, own, strict=True)]


def shaped_rewards(
    trajectories: Sequence[Trajectory], episodes: Episodes, config: Any
) -> np.ndarray:
    """Rewards `[N]` float64 that advantages are estimated from, after reward shaping.

    Args:
        trajectories: Rows of the episodes.
        episodes: `N` episodes.
        config: Config of the run (`RLConfig`).
    """
    reward = episodes.reward.copy()
    for shaping in config.parts.reward:
        reward = shaping(reward, trajectories, episodes, config.max_new_tokens)
    return reward


def spread_over_tokens(
    advantage: np.ndarray, trajectories: Sequence[Trajectory], episodes: Episodes
) -> list[np.ndarray]:
    """Advantage `[N]` of each episode spread over all tokens of its rows, `[L]` float64 each."""
    found = [np.zeros(0)] * len(trajectories)
    for rows, value in zip(episodes.rows, advantage, strict=True):
        for row in rows:
            found[row] = np.full(len(trajectories[row].tokens), value)
    return found


def turn_advantages(
    trajectories: Sequence[Trajectory], episodes: Episodes, gamma: float
) -> list[np.ndarray]:
    """Discounted return of each turn, normalised over all turns of the batch, for its tokens.

    Args:
        trajectories: Rows of the episodes.
        episodes: `N` episodes.
        gamma: Discount of the rewards of later turns (γ).

    Returns:
        Advantages of the tokens of each row, `[L]` float64 each.
    """
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
