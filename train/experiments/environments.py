"""Scores of the random and the scripted player of each environment, as a table.

python -m train.experiments.environments --episodes 500
"""

import dataclasses

from train.cli.command import run_command
from train.experiments.study import check_names
from train.rl.environments import ENVIRONMENTS
from train.rl.environments.players import score_player
from train.rl.named_tasks import make_task

PLAYERS = ("random", "scripted")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Plays the first training problems of each environment by its two players.

    Attributes:
        environments: Environments with their options; all that have players by default.
        episodes: Number of episodes of each player.
        seed: Seed of the order of problems and of the players.
    """

    environments: tuple[str, ...] = tuple(
        name for name, kind in ENVIRONMENTS.items() if hasattr(kind, "random_action")
    )
    episodes: int = 500
    seed: int = 0


def main(config: Experiment) -> None:
    """Print a row for each environment and player."""
    if config.episodes < 1:
        raise ValueError(f"episodes={config.episodes}: choose 1 or more")
    names = [text.partition("(")[0] for text in config.environments]
    check_names("environment with players", names, Experiment.environments)
    print("| environment | player | success | reward | turns |\n|---|---|---|---|---|")
    for text in config.environments:
        environment = make_task(text, config.seed)
        for player in PLAYERS:
            score = score_player(environment, player, config.episodes, config.seed, "train")
            print(
                f"| `{text}` | {player} | {score.success:.3f} ± {score.success_error:.3f} "
                f"| {score.reward:.3f} | {score.turns:.2f} |",
                flush=True,
            )


def command() -> None:
    run_command(main, Experiment)


if __name__ == "__main__":
    command()
