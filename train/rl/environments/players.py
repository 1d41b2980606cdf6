"""Episodes of the random and the scripted player of an environment, and their scores."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train.rl.environments.stepping import counted_step
from train.rl.problems import digest
from train.rl.protocols import Environment
from train.rl.types import Completion, Problem, Turn

Player = Callable[[Sequence[str], np.random.Generator], str]
"""Action for the texts so far: the prompt, the first action, its observation, and so on."""


def player_of(environment: Any, name: str) -> Player:
    """A player of an environment.

    Args:
        environment: Environment, or a task of one response.
        name: "random" or "scripted".

    Raises:
        ValueError: The environment has no such player.
    """
    found = getattr(environment, f"{name}_action", None)
    if found is None:
        raise ValueError(
            f"player={name!r}: {environment.name} has no such player: play it yourself"
        )
    return found


@dataclasses.dataclass(frozen=True)
class PlayedEpisode:
    """An episode to its end.

    Attributes:
        problem: Problem that it began from.
        shown: Prompt, first action, its observation, and so on; the last observation too.
        rewards: Reward of each turn.
        last: The last turn.
    """

    problem: Problem
    shown: tuple[str, ...]
    rewards: tuple[float, ...]
    last: Turn


def completion_of(problem: Problem, text: str) -> Completion:
    """A text as a whole response of a policy."""
    return Completion(problem, text, (), True)


def play_episode(
    environment: Environment, problem: Problem, player: Player, rng: np.random.Generator
) -> PlayedEpisode:
    """Play an episode to its end.

    Args:
        environment: Environment whose episodes end.
        problem: Problem to begin from.
        player: Player, who sees the texts alone.
        rng: Generator of the player.
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
    """Means over episodes.

    Attributes:
        episodes: Number of episodes.
        success: Share of episodes that were solved.
        success_error: Standard error of that share.
        reward: Mean sum of an episode's rewards.
        turns: Mean number of turns.
    """

    episodes: int
    success: float
    success_error: float
    reward: float
    turns: float


def score_player(
    environment: Any, player: str, episodes: int, seed: int, split: str = "test"
) -> Score:
    """Scores of a player of the environment on its first problems.

    Args:
        environment: Environment with players.
        player: "random" or "scripted".
        episodes: Number of episodes; a finite split begins again at its end.
        seed: Seed of the player.
        split: Split of the problems.

    Raises:
        ValueError: The environment has no such player.
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
