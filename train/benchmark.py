"""Run a speed benchmark, usually against a plain decoder of the same size: train.benchmark [NAME].

NAME is `step` (training, the default), `selection` (the cost of selecting streams in a forward
pass), `decode` (cached decoding against recomputing the prefix), `first-token` (prefill, with the
blocks scanned as one stack or unrolled), `hatchling` (training step, prefill and decoding of a
Dragon Hatchling), `memgen` (the cost of weaving), `rl` (rollouts, updates, and the time saved by
prefilling a prompt once for all rows), `accelerator` (the parts of a model on one GPU or TPU), or
one beside another library: `transformers` (decoding), `nanodo` (a plain train step) or `fork-xla`
(a train step with forks).
"""

import sys

from train.benchmarks import (
    beside_training,
    beside_transformers,
    decoding,
    first_token,
    hatchling,
    memgen,
    rl,
    selection,
    training,
)
from train.benchmarks.accelerator import config as accelerator
from train.cli.command import run_command

COMMANDS = {
    "step": (training.main, training.TrainingBenchmark),
    "selection": (selection.main, selection.SelectionBenchmark),
    "memgen": (memgen.main, memgen.MemGenBenchmark),
    "rl": (rl.main, rl.RLBenchmark),
    "hatchling": (hatchling.main, hatchling.HatchlingBenchmark),
    "first-token": (first_token.main, first_token.FirstTokenBenchmark),
    "accelerator": (accelerator.main, accelerator.AcceleratorBenchmark),
    "decode": (decoding.main, decoding.DecodeBenchmark),
    "transformers": (beside_transformers.main, beside_transformers.TransformersBenchmark),
    "nanodo": (beside_training.beside_nanodo, beside_training.BesideTraining),
    "fork-xla": (beside_training.beside_fork_xla, beside_training.ForkXLABenchmark),
}


def command() -> None:
    # The first argument names the benchmark, like a preset in other commands.
    name = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "step"
    run_command(*COMMANDS[name])


if __name__ == "__main__":
    command()
