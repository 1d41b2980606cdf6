"""Convert objects to and from text such as `name(key=value, ...)`, for options and configs.

Values are Python literals; no code is evaluated.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, get_type_hints

from thoughtbubbles.fields import shown
from thoughtbubbles.typed_json import fields_of, required_options, typed
from train.cli.entries import check_dataclass
from train.cli.numbers import infinite_options
from train.cli.plugins import OPTION

_LONGEST = 10_000  # maximum number of characters of an object's text


def from_text(text: str, choices: Mapping[str, type[Any]], kind: str, **given: Any) -> Any:
    """Make a dataclass instance from text such as `PrefixRank(ratio=1.5)`.

    Args:
        text: A name, or a name with options in brackets: `PrefixRank(ratio=1.5, window=64)`.
            Options left out take their defaults.
        choices: Mapping from names to dataclasses.
        kind: Noun for the choices in error messages, such as "policy" or "task".
        given: Field values that replace the fields' defaults, for fields that the text leaves out.

    Raises:
        ValueError: The name or an option is unknown, a required option is missing, or a value has
            the wrong type or is infinite where the option must be finite. The message is one line
            and tells the user what to write.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"{kind} {shown(text)} has {len(text)} characters, more than {_LONGEST}")
    name = text.partition("(")[0].partition(":")[0].strip()
    if name not in choices:
        close = difflib.get_close_matches(name, choices, 1, 0.5)
        hint = f" (perhaps {close[0]}?)" if close else ""
        raise ValueError(
            f"unknown {kind} {shown(name)}{hint}: choose one of {', '.join(choices)}, or import "
            f"the module that registers it ({OPTION})"
        )
    chosen = choices[name]
    check_dataclass(kind, name, chosen)
    try:
        options = _options(text.strip(), chosen)
    except (ArithmeticError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{kind} {shown(text, 200)}: write {signature(name, chosen)}") from None
    for option, value in options.items():
        if _is_infinite(value) and option not in infinite_options(chosen):
            raise ValueError(f"{kind} {name}: {option}={shown(value)}: choose a finite number")
    return chosen(**{**given, **options})


def signature(name: str, chosen: type[Any]) -> str:
    """Format a dataclass with the defaults of its options; `...` marks a required option."""
    written = []
    for field in fields_of(chosen):
        default = {} if field.default_factory is dict else field.default
        missing = default is dataclasses.MISSING
        written.append(f"{field.name}={'...' if missing else repr(default)}")
    return f"{name}({', '.join(written)})"


def text_of(word: str, value: Any) -> str:
    """Format an object with all of its options as text that `from_text` parses to an equal object.

    Integers in float fields are written as floats, and infinity as 1e999.

    Args:
        word: Name of the object's class in the choices of `from_text`.
        value: Object to format, an instance of a dataclass.
    """
    types = get_type_hints(type(value))
    options = []
    for field in fields_of(value):
        option = getattr(value, field.name)
        with contextlib.suppress(TypeError):  # 0 for 0.0 is no difference
            option = typed(option, types[field.name])
        infinite = isinstance(option, float) and math.isinf(option)
        text = f"{'-' * (option < 0)}1e999" if infinite else repr(option)
        options.append(f"{field.name}={text}")
    return f"{word}({', '.join(options)})"


def _is_infinite(value: Any) -> bool:
    """Return whether a literal is an infinite float such as `1e999`, or contains such a float."""
    if isinstance(value, Mapping):
        return any(_is_infinite(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple, set)):
        return any(map(_is_infinite, value))
    return isinstance(value, float) and math.isinf(value)


def _options(text: str, chosen: type[Any]) -> dict[str, Any]:
    """Parse the options in brackets; raise an exception if the dataclass has no such options."""
    call = ast.parse(text, mode="eval").body
    if isinstance(call, ast.Name):
        keywords = []
    elif isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
        keywords = call.keywords
    else:
        raise TypeError("neither a name nor a call")
    types = get_type_hints(chosen)
    fields = {field.name: field for field in fields_of(chosen)}
    options = {}
    for keyword in keywords:
        if keyword.arg not in fields or keyword.arg in options:
            raise TypeError("no such option, or twice the same")
        options[keyword.arg] = typed(ast.literal_eval(keyword.value), types[keyword.arg])
    if required_options(chosen) - options.keys():
        raise TypeError("an option without default is left out")
    return options
