"""Speed side by side with the plain decoder of the same size: python -m train.benchmark [WHAT].

WHAT is `step` (training, the default), `selection` (what choosing streams costs in a forward pass),
`decode` (cached decoding against recomputation), `first-token` (prefill, blocks in their stack or
one by one), `hatchling` (a Dragon Hatchling: step, prefill, decoding), `memgen` (what weaving
costs), `rl` (rollouts, updates, and what it saves to prefill a prompt once for all rows) or
`accelerator` (what one GPU or TPU does, part by part).
"""

import sys

from train.benchmarks import decoding, first_token, hatchling, memgen, rl, selection, training
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
}


def command() -> None:
    # The first word chooses, as presets do elsewhere.
    name = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "step"
    run_command(*COMMANDS[name])


if __name__ == "__main__":
    command()
