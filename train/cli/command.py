"""Parse the options of a command and run it; a user's mistake prints one line, no traceback."""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from thoughtbubbles import ARCHITECTURES, Policy
from thoughtbubbles.fields import cut
from thoughtbubbles.positions import RopeScaling
from train.cli.calls import from_text
from train.cli.config_json import POLICIES, policy_from_text
from train.cli.numbers import check_numbers
from train.cli.option_rules import RULES, one_word, option_rule
from train.cli.plugins import join_plugins, load_plugins
from train.cli.presets_help import presets_text
from train.devices.failures import RunFailed
from train.devices.hardware import quiet_libtpu

Config = TypeVar("Config")


ARCHITECTURE = "--architecture"
_LONGEST_LINE = 2000  # characters of an error line
# Beginnings of messages by Python and tyro that don't name the option; tyro's box names it.
_UNNAMED = ("invalid literal", "could not convert", "no type matching")
_NO_HOME = "Could not determine home directory"  # of `Path.expanduser`, which names no path


@option_rule
def policy_option(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Make a policy one option, written as the policy's repr, instead of a tyro subcommand."""
    return one_word(option, (Policy, *POLICIES.values()), "POLICY", policy_from_text, repr)


@option_rule
def rope_scaling_option(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Make RoPE scaling one option, written as JSON like in a config.json, or as `none`."""
    show = lambda scaling: json.dumps(scaling and dataclasses.asdict(scaling))  # noqa: E731
    return one_word(option, (RopeScaling,), "JSON|none", rope_scaling_from_text, show)


def rope_scaling_from_text(text: str) -> RopeScaling | None:
    """Parse RoPE scaling such as `{"rope_type": "linear", "factor": 2}`; `none` gives None.

    Raises:
        ValueError: The text is neither `none` nor a JSON object with fields of `RopeScaling`.
    """
    if text in ("none", "null"):
        return None
    try:
        return RopeScaling(**json.loads(text))
    except (TypeError, json.JSONDecodeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(RopeScaling))
        raise ValueError(f"rope scaling {text!r}: write none or JSON with {names}") from error


def run_command(
    main: Callable[[Config], Any],
    config: type[Config],
    presets: Mapping[str, Config] | None = None,
) -> None:
    """Parse the command line into `config` and call `main` with it.

    A `ValueError` or `OSError`, which the user can correct, prints one line and exits with status
    2; a `RunFailed` or an out-of-memory error exits with one line and status 1. If the environment
    variable `THOUGHTBUBBLES_TRACEBACK` is set, the error is raised with its traceback instead.

    Args:
        main: Function that does the work of the command, given the config.
        config: Frozen dataclass; each of its fields becomes an option.
        presets: Mapping from names to default configs. The first word of the command line may name
            a preset; otherwise the first preset is used. None takes the defaults of `config`.
    """
    quiet_libtpu()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # else a log stays empty for long
    warnings.formatwarning = _warning
    words = sys.argv[1:]
    try:
        others = load_plugins(words)
        plugin = "plugin" in {field.name for field in dataclasses.fields(cast(Any, config))}
        words = join_plugins(words) if plugin else others
        default = None
        if presets is not None:
            named = bool(words) and not words[0].startswith("-")
            name = words.pop(0) if named else next(iter(presets))
            if name not in presets:
                raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
            default = with_architecture(presets[name], words)
            if {"-h", "--help"} & set(words):
                names = ", ".join(ARCHITECTURES)
                print(f"{presets_text(presets)}\n\n{ARCHITECTURE} NAME(option=value): {names}\n")
        main(parse(config, words, default))
    except BrokenPipeError:  # of `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("THOUGHTBUBBLES_TRACEBACK"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        if os.environ.get("THOUGHTBUBBLES_TRACEBACK"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith(_NO_HOME) and not os.environ.get("THOUGHTBUBBLES_TRACEBACK"):
            print(f"error: {_unknown_home()}", file=sys.stderr)
            sys.exit(2)
        full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if not full or os.environ.get("THOUGHTBUBBLES_TRACEBACK"):
            raise
        print(f"error: {_out_of_memory(error)}", file=sys.stderr)
        sys.exit(1)


def _warning(message: Warning | str, *where: object, **line: object) -> str:
    """Format a warning in one line, without the line of source code that Python shows."""
    del where, line
    return f"warning: {_one_line(message)}\n"


def _one_line(error: Exception | str) -> str:
    """Join the lines of an error message, and shorten it."""
    line = re.sub(r"\s*\n\s*", " ", str(error).strip())
    if len(line) > _LONGEST_LINE:
        # A huge value, which tyro breaks into words of one line each, would hide the end.
        line = re.sub(r"\S{300,}|(?:\S{60,} ){3,}\S*", _shortened, line)
    return cut(line, _LONGEST_LINE)


def _shortened(found: re.Match[str]) -> str:
    """Shorten a long text to its two ends, since the end of a path is the most informative."""
    return f"{found[0][:50]}...{found[0][-50:]}"


def _unknown_home() -> str:
    paths = [word for word in sys.argv[1:] if word.rpartition("=")[2].startswith("~")]
    return f"{' '.join(paths) or '~'}: whose home that is, is unknown here: write the path in full"


def _out_of_memory(error: Exception) -> str:
    reason = (str(error).splitlines() or ["no more was to be had"])[0]
    return (
        f"out of memory ({cut(reason, 200)}): make the batch, the texts or the model smaller "
        "(THOUGHTBUBBLES_TRACEBACK=1 says where)"
    )


def with_architecture(default: Config, words: list[str]) -> Config:
    """Replace the model of a default config with the architecture that `--architecture` names.

    The options `--model.*` are then those of the named architecture. Where it is another than the
    default's, so is the default run folder: `runs/tiny_mine` in place of `runs/tiny`.

    Args:
        default: Default config; a config without a field `model` is returned unchanged.
        words: Words of the command line. `--architecture` and its value are removed from the list;
            if the option is repeated, its last value counts. Without the option, nothing changes.

    Returns:
        Config with the replaced model.

    Raises:
        ValueError: The architecture is unknown, or its name or options are missing or wrong.
    """
    if "model" not in {field.name for field in dataclasses.fields(cast(Any, default))}:
        return default
    configs = {name: entry.config_class for name, entry in ARCHITECTURES.items()}
    while places := [i for i, word in enumerate(words) if word.partition("=")[0] == ARCHITECTURE]:
        first, *later = places
        _, given, text = words.pop(first).partition("=")
        if not given:
            if first == len(words):
                raise ValueError(f"{ARCHITECTURE} needs a name: {', '.join(configs)}")
            text = words.pop(first)
        if not later:
            model, given = from_text(text, configs, "architecture"), cast(Any, default)
            other = type(model) is not type(given.model)
            out = f"{given.out}_{text.partition('(')[0].strip()}" if other else given.out
            default = dataclasses.replace(given, model=model, out=out)
    return default


def parse(config: type[Config], words: list[str], default: Config | None = None) -> Config:
    """Parse options into a config; a mistake in the options raises a one-line `ValueError`."""
    box, registry = io.StringIO(), ConstructorRegistry()
    for rule in RULES:
        registry.primitive_rule(rule)
    try:
        with contextlib.redirect_stderr(box):
            if default is None:
                found = tyro.cli(config, prog=_program(), args=words, registry=registry)
            else:
                found = tyro.cli(
                    config, prog=_program(), args=words, default=default, registry=registry
                )
    except SystemExit as end:
        if end.code in (0, None):  # --help
            raise
        # This project's messages come unwrapped; tyro's are in a box, above its first rule.
        text = getattr(end.__context__, "message", None)
        if not isinstance(text, str) or text.startswith(_UNNAMED):
            inside = box.getvalue().partition("\n")[2]  # the first line is the box's title
            parts = re.split(r"^\W*[-─]{9,}\W*$", inside, flags=re.MULTILINE)
            parts = [
                " ".join(re.sub(r"^[│|]|[│|]$", " ", part, flags=re.MULTILINE).split())
                for part in parts
            ]
            text = next(filter(None, parts), "unknown mistake").partition(" Got errors: ")[0]
            close = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(parts))
            text = f"{text} ({f'perhaps {close[1]}? ' if close else ''}see --help)"
        raise ValueError(text) from None
    check_numbers(found)
    return found


def _program() -> str:
    """Return the command as the user typed it, without its options."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or sys.argv[0].startswith("thoughtbubbles "):
        return sys.argv[0]
    return f"python -m {spec.name.removesuffix('.__main__')}"
