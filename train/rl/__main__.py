"""Reinforcement learning: python -m train.rl --weights runs/sft --task arithmetic --method grpo"""

import shlex

import jax

from train.cli.command import run_command
from train.cli.plugins import plugin_options
from train.devices.distributed import distributed_context, sync_errors
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.loop import train
from train.rl.named_tasks import tasks_help
from train.rl.parts import choices


def main(config: RLConfig) -> None:
    """Train a policy, then print the command that generates text with it.

    With `task="help"`, list the tasks instead; with `dry_run`, only describe the run.
    """
    if config.task == "help":
        print(tasks_help())
        return
    with distributed_context(config.distributed):
        with sync_errors():
            job = RLJob(config)
        main_process = jax.process_index() == 0
        if config.dry_run:
            if main_process:
                print(job.describe())
            return
        train(job)
        if main_process:
            chat = "--chat " if config.chat else ""
            print(
                f"thoughtbubbles generate --checkpoint {shlex.quote(config.out)} {chat}"
                f"--prompt '...'{plugin_options(config.plugin)}"
            )


def command() -> None:
    try:
        run_command(main, RLConfig)
    except SystemExit as end:
        if not end.code:  # --help
            print(choices())
        raise


if __name__ == "__main__":
    command()
