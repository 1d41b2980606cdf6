"""Pretraining: python -m train.pretrain [PRESET] [--option value ...]."""

import sys

from train.command import run_command
from train.config import RunConfig
from train.generate import map_of_text, write
from train.load import load_model
from train.loop import NonFiniteLoss, train
from train.presets import PRESETS


def main(config: RunConfig) -> None:
    """Train, then show a sample and where the model forked in it."""
    try:
        train(config)
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    loaded = load_model(config.out)
    if loaded.step < config.steps:
        return
    [text] = write(loaded, [config.prompt], max_new_tokens=160, temperature=0.7, seed=0)
    print(f"\nsample (temperature 0.7):\n{text}\n")
    if loaded.model.config.fork_layers:
        print("live streams of each token of its start:")
        print(map_of_text(loaded, text[:160]).text())
    print(
        f"python -m train.generate --checkpoint {config.out} --prompt '{config.prompt}' --bubbles"
    )


if __name__ == "__main__":
    run_command(main, RunConfig, PRESETS)
