"""Fine-tune a decoder, a LoRA adapter or a weaver of latent memory on conversations.

python -m train.sft --weights smollm2 --data.path chats.jsonl --train lora
"""

import shlex

import jax

from train.cli.command import run_command
from train.cli.plugins import plugin_options
from train.devices.distributed import distributed_context, sync_errors
from train.engine.loop import run
from train.finetuning.job import SFTConfig, SFTJob
from train.runs.metadata import load_run_meta


def main(config: SFTConfig) -> None:
    """Fine-tune a model, and print a command that generates text with the result."""
    with distributed_context(config.distributed):
        if config.dry_run:
            with sync_errors():
                work = SFTJob(config)
                data = work.prepare()
            if jax.process_index() == 0:
                print(f"{data.summary}\n{work.describe(0)}")
            return
        run(lambda: SFTJob(config), config)
        if jax.process_index() == 0:
            meta = load_run_meta(config.out) or {}
            chat = "--chat " if meta.get("chat", {}).get("chat_template") else ""
            print(
                f"thoughtbubbles generate --checkpoint {shlex.quote(config.out)} {chat}"
                f"--prompt '...'{plugin_options(config.plugin)}"
            )


def command() -> None:
    run_command(main, SFTConfig)


if __name__ == "__main__":
    command()
