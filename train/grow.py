"""More neurons for a trained Dragon Hatchling, which computes what it did and learns on.

thoughtbubbles grow --checkpoint runs/a --num-neurons 4096 --out runs/b
"""

from train.cli.command import run_command
from train.pretraining.growing import GrowConfig, grow_run


def main(config: GrowConfig) -> None:
    """Grow a run and print what was done."""
    print(grow_run(config))


def command() -> None:
    run_command(main, GrowConfig)


if __name__ == "__main__":
    command()
