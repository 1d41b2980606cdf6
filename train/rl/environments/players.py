"""Playing and scoring episodes with the random and scripted players of environments."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train.rl.environments.stepping import counted_step
from train.rl.problems import digest
from train.rl.protocols import Environment
from train.rl.types import Completion, Problem, Turn

Player = Callable[[Sequence[str], np.random.Generator], str]
"""Function from the texts so far and a random generator to the text of the next action.

The texts are the prompt, the first action, its observation, and so on."""


def player_of(environment: Any, name: str) -> Player:
    """Return the random or the scripted player of an environment.

    Args:
        environment: Environment or task with a method `random_action` or `scripted_action`.
        name: Name of the player, "random" or "scripted".

    Raises:
        ValueError: The environment has no method for this player.
    """
    found = getattr(environment, f"{name}_action", None)
    if found is None:
        raise ValueError(
            f"player={name!r}: {environment.name} has no such player: play it yourself"
        )
    return found


@dataclasses.dataclass(frozen=True)
class PlayedEpisode:
    """Record of a finished episode that a player has played.

    Attributes:
        problem: Problem that the episode began from.
        shown: Prompt, first action, its observation, and so on up to the last observation.
        rewards: Reward of each turn.
        last: Last turn of the episode.
    """

    problem: Problem
    shown: tuple[str, ...]
    rewards: tuple[float, ...]
    last: Turn


def completion_of(problem: Problem, text: str) -> Completion:
    """Wrap a text as a finished response of a policy, without token ids."""
    return Completion(problem, text, (), True)


def play_episode(
    environment: Environment, problem: Problem, player: Player, rng: np.random.Generator
) -> PlayedEpisode:
    """Play an episode to its end.

    Args:
        environment: Environment that ends or truncates all its episodes.
        problem: Problem to begin from.
        player: Player, which sees only the texts of the episode.
        rng: Random generator of the player.
    """
    state, shown, rewards = environment.reset(problem), [problem.prompt], []
    while True:
        action = player(shown, rng)
        turn = counted_step(environment, problem, state, completion_of(problem, action))
        state = turn.state
        shown += [action, turn.observation]
        rewards.append(turn.reward)
        if turn.terminated or turn.truncated:
            return PlayedEpisode(problem, tuple(shown), tuple(rewards), turn)


@dataclasses.dataclass(frozen=True)
class Score:
    """Success rate, reward and number of turns of a player, averaged over episodes.

    Attributes:
        episodes: Number of episodes.
        success: Fraction of episodes whose problem was solved.
        success_error: Standard error of `success`.
        reward: Mean over episodes of the sum of rewards.
        turns: Mean number of turns of an episode.
    """

    episodes: int
    success: float
    success_error: float
    reward: float
    turns: float


def score_player(
    environment: Any, player: str, episodes: int, seed: int, split: str = "test"
) -> Score:
    """Play one episode of each of the first problems of a split, and average the results.

    Args:
        environment: Environment with players.
        player: Name of the player, "random" or "scripted".
        episodes: Number of episodes. Problems of a finite split are repeated in order if needed.
        seed: Seed of the player.
        split: Split of the problems.

    Raises:
        ValueError: The environment has no method for this player.
    """
    size = environment.sizes[split]
    act = player_of(environment, player)
    played = []
    for index in range(episodes):
        problem = environment.problem(split, index if size is None else index % size)
        rng = np.random.default_rng([seed, index, digest(problem.uid)])
        played.append(play_episode(environment, problem, act, rng))
    success = np.array([episode.last.success for episode in played], float)
    return Score(
        len(played),
        float(success.mean()),
        float(success.std() / np.sqrt(len(played))),
        float(np.mean([sum(episode.rewards) for episode in played])),
        float(np.mean([len(episode.rewards) for episode in played])),
    )
