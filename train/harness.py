"""EleutherAI's evaluation harness, its own command line, on models of ours (the extra `lm-eval`).

python -m train.harness run --model thoughtbubbles --model_args model=smollm2 --tasks piqa
"""

import sys

from train.devices.hardware import quiet_libtpu
from train.evaluation import lm_eval_model


def main() -> None:
    """The harness's command line, which then knows `--model thoughtbubbles`."""
    if lm_eval_model.harness is None:
        raise ValueError(lm_eval_model.INSTALL)
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

    quiet_libtpu()
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
