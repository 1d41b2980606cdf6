"""Import plugins (`--plugin mine`), modules that extend registries, before options are parsed.

A plugin is imported only if the user names it, never because a checkpoint names it.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.cli.entries import check_entries

OPTION = "--plugin"


def load_plugins(words: Sequence[str]) -> list[str]:
    """Import the modules that `--plugin` names, also from the working directory.

    The working directory is last on the path, so that a file there hides no installed package.

    Args:
        words: Words of the command line.

    Returns:
        Words of the command line without `--plugin` and its modules, for commands whose configs
        have no field `plugin`.

    Raises:
        ValueError: `--plugin` names no module, or a module does not exist, fails to import, or is
            another than the one of this name in the working directory.
    """
    names, others = _named(words)
    if not all(names):
        raise ValueError(f"{OPTION} names no module: write {OPTION} mine for mine.py")
    for name in names:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module's own code raises
            missing = isinstance(error, ModuleNotFoundError) and error.name in (name, _root(name))
            if missing or name.startswith("."):
                raise ValueError(
                    f"plugin {name!r}: {error}: name a module that can be imported, such as mine "
                    f"for mine.py in {os.getcwd()}"
                ) from error
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())
            raise ValueError(
                f"plugin {name!r} failed: {type(error).__name__}: {text} "
                f"({frame.filename}, line {frame.lineno})"
            ) from error
        _check_origin(_root(name))
    if names:
        check_entries()
    return others


def join_plugins(words: Sequence[str]) -> list[str]:
    """Join repeated `--plugin` options into one option, the last, that names all modules."""
    names, others = _named(words)
    return [*others, OPTION, *names] if names else others


def _root(name: str) -> str:
    return name.partition(".")[0]


def _check_origin(name: str) -> None:
    """Raise a ValueError if a module hides one of the same name in the working directory.

    Args:
        name: Name of an imported module, without dots.
    """
    here = [path for path in (Path(f"{name}.py"), Path(name, "__init__.py")) if path.is_file()]
    found = getattr(sys.modules[name], "__file__", None)
    if here and not (found and any(path.samefile(found) for path in here)):
        raise ValueError(
            f"plugin {name!r} is {found or 'a part of Python'}, which hides {here[0]} in "
            f"{os.getcwd()}: rename that"
        )


def plugin_options(names: Sequence[str]) -> str:
    """Format plugins as an option to append to a command, with a leading space; "" for none."""
    return f" {OPTION} {' '.join(names)}" if names else ""


def missing_plugins(config: Mapping[str, Any]) -> str:
    """Return a hint for a run that cannot be loaded because its plugins are not imported.

    Args:
        config: Saved config of the run, a mapping from option names to JSON values.

    Returns:
        Text to append to the error message; "" if all plugins of the run are loaded.
    """
    names = config.get("plugin")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    missing = [name for name in names if name not in sys.modules]
    if not missing:
        return ""
    return f" (the run was made with {OPTION} {' '.join(missing)}: pass it here too)"


def _named(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the modules named as `--plugin a b` or `--plugin=a b`, and all other words.

    A `--plugin` that no module follows gives an empty name.
    """
    names: list[str] = []
    others: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        option, given, first = word.partition("=")
        if option != OPTION:
            others.append(word)
            continue
        found = [first] if given else []
        while words and not words[0].startswith("-"):
            found.append(words.pop(0))
        names += found or [""]
    return names, others
