"""Commands: a user's mistake is one line on stderr and exit status 2, never a traceback."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config")


def run_command(
    main: Callable[[Config], Any],
    config: type[Config],
    presets: Mapping[str, Config] | None = None,
) -> None:
    """Parse the command line into `config` and call `main` with it.

    Args:
        main: does the work; a `ValueError` from it is the user's mistake.
        config: frozen dataclass; every field becomes an option.
        presets: named values; the first word of the command line may name one (default: the first).
    """
    words = sys.argv[1:]
    try:
        if presets is None:
            parsed = tyro.cli(config, args=words)
        else:
            named = bool(words) and not words[0].startswith("-")
            name = words[0] if named else next(iter(presets))
            if name not in presets:
                raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
            parsed = tyro.cli(config, args=words[1:] if named else words, default=presets[name])
        main(parsed)
    except ValueError as error:
        if os.environ.get("THOUGHTBUBBLES_TRACEBACK"):
            raise
        logging.shutdown()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
