"""Credit assignment: advantages of tokens, computed from rewards of episodes and turns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl.learning import advantages as estimators
from train.rl.types import Episodes, Trajectory


def assign_advantages(
    trajectories: Sequence[Trajectory], episodes: Episodes, config: Any
) -> list[np.ndarray]:
    """Compute the advantages of a step: reward shaping, advantage estimation and clipping.

    Args:
        trajectories: Rows that are trained on.
        episodes: The episodes that the rows belong to.
        config: Config of the run (`RLConfig`), whose reward shapings, advantage estimator and
            `advantage_clip` are applied.

    Returns:
        Advantages of the tokens of each trajectory, `[L]` float64 for a trajectory of `L` tokens.
        Where the rollout strategy has set `Trajectory.advantages`, these are returned unclipped.
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
    """Apply all reward shapings of a run, in order, to the rewards of episodes.

    Args:
        trajectories: Rows of the episodes.
        episodes: `N` episodes.
        config: Config of the run (`RLConfig`).

    Returns:
        Shaped rewards, from which advantages are estimated, `[N]` float64.
    """
    reward = episodes.reward.copy()
    for shaping in config.parts.reward:
        reward = shaping(reward, trajectories, episodes, config.max_new_tokens)
    return reward


def spread_over_tokens(
    advantage: np.ndarray, trajectories: Sequence[Trajectory], episodes: Episodes
) -> list[np.ndarray]:
    """Copy the advantage of each episode to all tokens of its rows.

    Args:
        advantage: Advantage of each episode, `[N]`.
        trajectories: Rows of the episodes.
        episodes: `N` episodes.

    Returns:
        Advantages of the tokens of each row, `[L]` float64 for a row of `L` tokens.
    """
    found = [np.zeros(0)] * len(trajectories)
    for rows, value in zip(episodes.rows, advantage, strict=True):
        for row in rows:
            found[row] = np.full(len(trajectories[row].tokens), value)
    return found


def turn_advantages(
    trajectories: Sequence[Trajectory], episodes: Episodes, gamma: float
) -> list[np.ndarray]:
    """Compute discounted returns of turns, normalised over all turns of the batch (ReBN).

    Args:
        trajectories: Rows of the episodes.
        episodes: `N` episodes.
        gamma: Discount of the rewards of later turns (γ).

    Returns:
        Advantages of the tokens of each row, `[L]` float64 for a row of `L` tokens. A token that
        the policy generated has the normalised return of its turn.

    Raises:
        ValueError: An episode has more or fewer rewards than responses.
    """
    for rows in episodes.rows:
        _check_turn_rewards([trajectories[row] for row in rows], "rebn")
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
            # Each turn overwrites the rest of the row; observations are not trained.
            for offset, begin in enumerate(row.begins):
                found[index][begin:] = normalised[row.turn + offset]
    return found


def token_advantages(
    trajectories: Sequence[Trajectory],
    episodes: Episodes,
    reward: np.ndarray,
    gamma: float,
    lam: float,
) -> list[np.ndarray]:
    """Compute GAE over the generated tokens of each episode, across its turns and rows.

    The last generated token of a turn receives the reward of the turn, and γ discounts only after
    this token. The last generated token of an episode also receives what reward shaping has added.
    A truncated episode is treated like a terminated episode: its return is not bootstrapped from a
    value.

    Args:
        trajectories: Rows of the episodes. Rows without `values` count as having values of 0.
        episodes: `N` episodes.
        reward: Shaped reward of each episode, `[N]` float64.
        gamma: Discount of the rewards after a turn (γ).
        lam: Decay of later TD errors, per token (λ).

    Returns:
        Advantages of the tokens of each row, `[L]` float64 for a row of `L` tokens; 0 for tokens
        that the policy did not generate.

    Raises:
        ValueError: An episode has more or fewer rewards than responses, or an empty response.
    """
    steps = [_steps([trajectories[row] for row in rows], gamma) for rows in episodes.rows]
    longest = max(len(paid) for paid, _, _ in steps)
    padded = np.zeros((3, len(steps), longest))
    for index, parts in enumerate(steps):
        padded[:, index, : len(parts[0])] = parts
        padded[0, index, len(parts[0]) - 1] += reward[index] - episodes.reward[index]
    paid, value, discount = padded
    advantage = estimators.gae(paid, value, discount, lam)
    found = [np.zeros(len(row.tokens)) for row in trajectories]
    for rows, mine in zip(episodes.rows, advantage, strict=True):
        done = 0
        for row in rows:
            trained = trajectories[row].trained
            found[row][trained] = mine[done : done + trained.sum()]
            done += trained.sum()
    return found


def whiten_tokens(
    trajectories: Sequence[Trajectory], advantages: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Normalise advantages to mean 0 and standard deviation 1 over all generated tokens.

    Args:
        trajectories: Rows of the batch.
        advantages: Advantages of the tokens of each row, `[L]` for a row of `L` tokens.

    Returns:
        Normalised advantages, `[L]` float64 each; 0 for tokens that the policy did not generate.
    """
    trained = [row.trained for row in trajectories]
    pooled = [values[mask] for values, mask in zip(advantages, trained, strict=True)]
    ends = np.cumsum([len(values) for values in pooled])
    found = [np.zeros(len(mask)) for mask in trained]
    parts = np.split(estimators.whiten(np.concatenate(pooled)), ends[:-1])
    for row, mask, values in zip(found, trained, parts, strict=True):
        row[mask] = values
    return found


def _steps(rows: Sequence[Trajectory], gamma: float) -> np.ndarray:
    """Stack the rewards, values and discounts of the `T` generated tokens of an episode, `[3, T]`.

    A value belongs to the state before a token; a reward and a discount apply after the token.
    """
    _check_turn_rewards(rows, "a value head")
    rewards = rows[0].turn_rewards
    parts = []
    for row in rows:
        values = np.zeros(len(row.tokens)) if row.values is None else row.values
        for offset, (begin, end) in enumerate(
            zip(row.begins, (*row.begins[1:], len(row.tokens)), strict=True)
        ):
            mine = values[begin:end][row.trained[begin:end]]
            if not len(mine):
                raise ValueError(
                    f"response {row.turn + offset} to problem {row.problem.uid} has no token that "
                    "its reward could come with: a value head needs one or more"
                )
            part = np.stack([np.zeros(len(mine)), mine, np.ones(len(mine))])
            part[0, -1], part[2, -1] = rewards[row.turn + offset], gamma
            parts.append(part)
    return np.concatenate(parts, axis=1)


def _check_turn_rewards(rows: Sequence[Trajectory], who: str) -> None:
    """Raise a `ValueError` if an episode has more or fewer rewards than responses."""
    responses, rewards = sum(len(row.begins) for row in rows), len(rows[0].turn_rewards)
    if responses != rewards:
        raise ValueError(
            f"an episode of problem {rows[0].problem.uid} has {responses} responses and {rewards} "
            f"rewards of turns: {who} needs one for each (turn_rewards)"
        )
