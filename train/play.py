"""Play an environment in the terminal: thoughtbubbles play "mastermind(length=4)"."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tyro

from train.cli.command import run_command
from train.rl.environments.one_turn import OneTurn
from train.rl.environments.players import Player, play_episode, player_of
from train.rl.named_tasks import make_task, tasks_help


@dataclasses.dataclass(frozen=True)
class PlayConfig:
    """Play one problem of an environment yourself, or watch a program play it.

    Attributes:
        environment: Environment or task with its options, e.g. "mastermind(length=4)"; "help" lists
            all environments and tasks.
        player: Player of the episode: the "person" at the keyboard, or the environment's "random"
            or "scripted" player.
        index: Index of the problem in its split.
        split: Split of the problem.
        seed: Seed of the order of problems and of the player.
    """

    environment: tyro.conf.Positional[str] = "help"
    player: Literal["person", "random", "scripted"] = "person"
    index: int = 0
    split: Literal["train", "test"] = "train"
    seed: int = 0


class _Left(Exception):
    """Raised when the person at the keyboard ends the input."""


def main(config: PlayConfig) -> None:
    """Play an episode, and print its outcome, total reward and the metrics of its last turn."""
    if config.environment == "help":
        print(tasks_help())
        return
    task: Any = make_task(config.environment, config.seed)
    size = task.sizes[config.split]
    if config.index < 0 or (size is not None and config.index >= size):
        most = "" if size is None else f" to {size - 1}"
        raise ValueError(f"index={config.index}: choose from 0{most}")
    environment = task if hasattr(task, "step") else OneTurn(task)
    print(" ".join((type(task).__doc__ or "").partition("\n\n")[0].split()))
    rng = np.random.default_rng(config.seed)
    problem = task.problem(config.split, config.index)
    try:
        episode = play_episode(environment, problem, _player(task, config.player), rng)
    except (_Left, KeyboardInterrupt):
        print("\nleft before the end")
        return
    print(episode.shown[-1])
    last, turns = episode.last, len(episode.rewards)
    outcome = "solved" if last.success else "cut" if last.truncated else "not solved"
    plural = "" if turns == 1 else "s"
    print(f"{outcome} after {turns} turn{plural}, reward {sum(episode.rewards):g}")
    counted = ", ".join(f"{name} {value:g}" for name, value in last.info.items() if value)
    if counted:
        print(counted)
    if last.error:
        print(last.error.rstrip())


def _player(task: Any, name: str) -> Player:
    if name == "person":
        return _person
    choose = player_of(task, name)

    def watched(shown: Sequence[str], rng: np.random.Generator) -> str:
        action = choose(shown, rng)
        print(f"{shown[-1]}\n> {action}")
        return action

    return watched


def _person(shown: Sequence[str], rng: np.random.Generator) -> str:
    del rng
    print(shown[-1])
    try:
        return input("> ")
    except EOFError:
        raise _Left from None


def command() -> None:
    run_command(main, PlayConfig)


if __name__ == "__main__":
    command()
