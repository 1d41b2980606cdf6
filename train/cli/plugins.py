"""Modules of the user's own that fill registries before a command line is read: `--plugin mine`.

A plugin is imported because its user names it, never because a checkpoint does.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

OPTION = "--plugin"


def load_plugins(words: Sequence[str]) -> None:
    """Import the modules that stand behind `--plugin`, from the working directory too.

    The working directory goes last on the path, so that a file there hides no installed package.

    Raises:
        ValueError: There is no such module.
    """
    for name in _named(words):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"plugin {name!r}: {error}: name a module that can be imported, such as mine for "
                f"mine.py in {os.getcwd()}"
            ) from error


def missing_plugins(config: Mapping[str, Any]) -> str:
    """What to say when a run can't be read: the plugins that it was made with and that are not
    loaded, or nothing.

    Args:
        config: Config of the run, as it was saved.
    """
    missing = [name for name in config.get("plugin", ()) if name not in sys.modules]
    if not missing:
        return ""
    return f" (the run was made with {OPTION} {' '.join(missing)}: pass it here too)"


def _named(words: Sequence[str]) -> list[str]:
    names = []
    for place, word in enumerate(words):
        if word == OPTION:
            for name in words[place + 1 :]:
                if name.startswith("-"):
                    break
                names.append(name)
    return names
