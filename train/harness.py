"""Run the command line of EleutherAI's evaluation harness on models of this library.

python -m train.harness run --model thoughtbubbles --model_args model=smollm2 --tasks piqa

The extra `lm-eval` must be installed. `--plugin mine` first imports the module `mine`, such as a
module that defines a run's fork policy.
"""

import sys

from train.cli.plugins import load_plugins
from train.devices.hardware import quiet_libtpu
from train.evaluation import lm_eval_model


def main() -> None:
    """Register `--model thoughtbubbles` with the harness, and run its command line.

    Raises:
        ValueError: The harness is not installed, or a plugin can't be imported.
    """
    if lm_eval_model.harness is None:
        raise ValueError(lm_eval_model.INSTALL)
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

    quiet_libtpu()
    sys.argv[1:] = load_plugins(sys.argv[1:])
    register_model("thoughtbubbles")(lm_eval_model.HarnessModel)
    cli_evaluate()


def command() -> None:
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command()
