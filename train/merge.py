"""Merge Dragon Hatchlings: thoughtbubbles merge --checkpoints runs/a runs/b --out runs/c."""

from train.cli.command import run_command
from train.pretraining.growing import MergeConfig, merge_runs


def main(config: MergeConfig) -> None:
    """Merge runs into a new run folder, and print the size of the merged model."""
    print(merge_runs(config))


def command() -> None:
    run_command(main, MergeConfig)


if __name__ == "__main__":
    command()
