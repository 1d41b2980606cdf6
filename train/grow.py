"""Add neurons to a trained Dragon Hatchling without changing its function.

thoughtbubbles grow --checkpoint runs/a --num-neurons 4096 --out runs/b
"""

from train.cli.command import run_command
from train.pretraining.growing import GrowConfig, grow_run


def main(config: GrowConfig) -> None:
    """Write a copy of a run with more neurons, and print how to resume the copy."""
    print(grow_run(config))


def command() -> None:
    run_command(main, GrowConfig)


if __name__ == "__main__":
    command()
