"""Demonstrations of an environment as chat data, and prompts of its variants.

thoughtbubbles demonstrations "sokoban_variants(variant='diverse')" --out train.jsonl
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import tyro

from train.cli.command import run_command
from train.cli.numbers import check_least
from train.finetuning.battery import BatteryConfig, instructed
from train.finetuning.demonstrations import (
    check_apart,
    demonstration_records,
    write_records,
)
from train.runs.files import check_new_file


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Writes what an expert does in the states of an environment, as `thoughtbubbles sft` reads it.

    Attributes:
        environment: Environment with variants and its options, e.g.
            "sokoban_variants(variant='diverse')" or "general_points(variant='diverse', maps=4)".
        out: File of training records to write, JSON Lines.
        count: Number of states of an epoch, of the environment's training problems.
        epochs: Number of passes; where a variant draws names, each pass has its own unless the
            environment has resample=False. Boards of Sokoban are the same in each, cards are dealt
            for what they count.
        form: Parts of a completion: the "answer" behind an empty thought, the "thoughts" alone,
            whose last word is the answer, or "both".
        battery: Folder for a file of held-out demonstrations of each variant, VARIANT.jsonl; none
            by default. Keep it apart from the training file: sft reads all files of a folder.
        battery_count: Number of states in each of these files.
        seed: Seed of the order of problems and of names.
    """

    environment: tyro.conf.Positional[str]
    out: str = "demonstrations.jsonl"
    count: int = 4000
    epochs: int = 1
    form: Literal["answer", "thoughts", "both"] = "answer"
    battery: str | None = None
    battery_count: int = 100
    seed: int = 0

    def __post_init__(self):
        check_least(self, count=1, epochs=1, battery_count=1, seed=0)


def main(config: DemonstrationsConfig) -> None:
    """Write the files, and print how many records each has."""
    environment = instructed(config.environment, config.seed)
    records = functools.partial(demonstration_records, form=config.form)
    files = {Path(config.out): records(environment, "train", config.count, config.epochs)}
    if config.battery is not None:
        variants = BatteryConfig(task=config.environment, seed=config.seed).environments()
        folder = Path(config.battery)
        check_apart(Path(config.out), folder, variants)
        files |= {
            folder / f"{name}.jsonl": records(variant, "test", config.battery_count, 1)
            for name, variant in variants.items()
        }
    for path in files:
        check_new_file(path)
    for path, of_file in files.items():
        print(f"{path}: {write_records(path, of_file)} records")


def command() -> None:
    run_command(main, DemonstrationsConfig)


if __name__ == "__main__":
    command()
