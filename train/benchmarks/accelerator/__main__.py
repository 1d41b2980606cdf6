"""Run the accelerator benchmark without tyro: python -m train.benchmarks.accelerator."""

import argparse
import sys
from typing import Any, NoReturn

from train.benchmarks.accelerator.config import AcceleratorBenchmark, main
from train.benchmarks.accelerator.part import PARTS


def command() -> None:
    """Parse the options of `AcceleratorBenchmark` and run it.

    A mistake in the options prints one line and exits with status 2.
    """
    defaults = AcceleratorBenchmark()
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmarks.accelerator",
        description=f"{AcceleratorBenchmark.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--out", default=defaults.out, metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", default=PARTS, metavar="PART")
    parser.add_argument("--then", metavar="FILE")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--compile-for", nargs="+", default=(), metavar="TOPOLOGY")
    parser.error = _mistake  # one line, without the usage
    options: dict[str, Any] = vars(parser.parse_args())
    try:
        for name in ("parts", "compile_for"):
            options[name] = tuple(options[name])
        main(AcceleratorBenchmark(**options))
    except (ValueError, OSError) as error:
        _mistake(str(error))


def _mistake(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    command()
