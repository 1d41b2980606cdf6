"""Audit a model by its activations or by prompts: thoughtbubbles audit COMMAND [OPTIONS]"""

import importlib
import sys
from typing import NamedTuple

from train.cli.command import run_command


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        module: Name of the module with the function `main(config)` of the command, which is
            imported only if the command is chosen.
        config: Name of the config class in that module.
        line: Description of the command in one line of the help.
    """

    module: str
    config: str
    line: str


COMMANDS: dict[str, Command] = {
    "lens": Command("train.audit.lens", "LensConfig", "what each site of a model would say"),
    "tuned-lens": Command(
        "train.audit.tuned_lens", "TunedLensConfig", "train affine maps that read early sites"
    ),
    "sae": Command(
        "train.audit.train_sae", "SAEConfig", "train a sparse autoencoder, describe its features"
    ),
    "organism": Command(
        "train.audit.organisms", "OrganismConfig", "conversations that teach a synthetic secret"
    ),
    "secret": Command(
        "train.audit.secret", "SecretConfig", "teach a model a secret and audit it, in one command"
    ),
    "report": Command(
        "train.audit.report", "ReportConfig", "which methods find a secret, beside a base model"
    ),
}


def command() -> None:
    """Run the subcommand that the first command-line argument names; without one, print the help.

    An unknown name prints one line and exits with status 2.
    """
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: thoughtbubbles audit COMMAND [OPTIONS]\n")
        print("\n".join(f"  {name:<{width}}  {of.line}" for name, of in COMMANDS.items()))
        return
    name = words[0]
    if name not in COMMANDS:
        print(
            f"error: unknown audit {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr
        )
        sys.exit(2)
    sys.argv = [f"{sys.argv[0]} {name}", *words[1:]]
    chosen = COMMANDS[name]
    module = importlib.import_module(chosen.module)
    run_command(module.main, getattr(module, chosen.config))


if __name__ == "__main__":
    command()
