"""Pretrain a model: python -m train.pretrain [PRESET] [--option value ...]."""

import shlex
from pathlib import Path

import jax

from thoughtbubbles import Thoughtbubbles
from train.cli.command import run_command
from train.cli.plugins import plugin_options
from train.devices.distributed import distributed_context, sync_errors
from train.devices.mesh import rows_here
from train.models.generation import map_of_text, write
from train.models.load import load_model
from train.pretraining.config import RunConfig
from train.pretraining.job import make_run, on_weights, train
from train.pretraining.plan import plan
from train.pretraining.presets import PRESETS
from train.runs.metadata import load_run_meta
from train.runs.run_folder import check_continuation

LONGEST_SAMPLE = 160
"""Maximum number of new tokens of the text that is sampled after training."""


def main(config: RunConfig) -> None:
    """Train a model, then print a sampled text and, for a model that forks, streams per token."""
    with distributed_context(config.distributed):
        if config.dry_run:
            dry_run(config)
            return
        train(config)
        first = jax.process_index() == 0
    if not first:
        return
    loaded = load_model(config.out)
    if loaded.step < config.steps:
        return
    # The sample fits into the context length of training, beyond which `write` prints a note.
    room = (loaded.context_length or LONGEST_SAMPLE) - len(loaded.prompt(config.prompt))
    new = min(max(room, 1), LONGEST_SAMPLE)
    [text] = write(loaded, [config.prompt], max_new_tokens=new, temperature=0.7, seed=0)
    print(f"\nsample (temperature 0.7):\n{text}\n")
    bubbles = isinstance(loaded.model, Thoughtbubbles) and loaded.model.fork_policy is not None
    if bubbles:
        print("live streams of each token of its start:")
        print(map_of_text(loaded, text[:160]).text())
    options = f"--checkpoint {shlex.quote(config.out)} --prompt {shlex.quote(config.prompt)}"
    options += " --bubbles" if bubbles else ""
    print(f"thoughtbubbles generate {options}{plugin_options(config.plugin)}")


def dry_run(config: RunConfig) -> None:
    """Check the config and the run folder without reading data, and print a summary of the run."""
    with sync_errors():
        config = on_weights(config)
        trainable = make_run(config)
        saved = load_run_meta(config.out)
        check_continuation(Path(config.out), saved, config)
    rows = config.batch_size  # not as a list, which may be too long for this machine
    if jax.process_count() > 1:
        rows = len(rows_here(rows, trainable.mesh))
    if jax.process_index() == 0:
        print(plan(config, trainable, rows, saved))


def command() -> None:
    run_command(main, RunConfig, PRESETS)


if __name__ == "__main__":
    command()
