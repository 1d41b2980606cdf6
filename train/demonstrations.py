"""Write an expert's demonstrations in an environment as chat data for fine-tuning.

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
    """Write demonstrations of an environment's expert as chat data for `thoughtbubbles sft`.

    Attributes:
        environment: Environment that has variants, with its options in brackets, e.g.
            "sokoban_variants(variant='diverse')" or "general_points(variant='diverse', maps=4)".
        out: JSON Lines file to write the training records to.
        count: Number of demonstrated states per epoch, from the environment's training problems.
        epochs: Number of epochs. Variants that sample names sample new names in each epoch, unless
            the environment has resample=False. Boards of Sokoban are the same in each epoch; cards
            are dealt anew for the card values of the epoch.
        form: Content of a completion: "answer" is the answer after an empty thought, "thoughts" is
            the reasoning alone, whose last word is the answer, and "both" is reasoning and answer.
        battery: Folder for held-out demonstrations, one file VARIANT.jsonl for each variant; none
            are written by default. They are for the held-out loss of `sft --data.validation-path`,
            which takes the folder or one of its files; the command `battery` makes its problems
            itself. Keep this folder apart from the training file, because sft reads all files of a
            folder.
        battery_count: Number of states in each held-out file.
        seed: Seed of the order of problems and of the sampled names.
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
    """Write the training records and each variant's held-out records, and print their numbers.

    Held-out records are written only if `config.battery` names a folder.
    """
    environment = instructed(config.environment, config.seed)
    records = functools.partial(demonstration_records, form=config.form)
    out = Path(config.out).expanduser()
    files = {out: records(environment, "train", config.count, config.epochs)}
    if config.battery is not None:
        variants = BatteryConfig(task=config.environment, seed=config.seed).environments()
        folder = Path(config.battery).expanduser()
        check_apart(out, folder, variants)
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
