"""How the command line reads options of our own types; tyro is imported only when it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

RULES: list[Callable[[Any], Any]] = []
"""Functions from the option that tyro asks about to how it is read, or None for other options."""


def option_rule(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorator that adds a function to `RULES`."""
    RULES.append(rule)
    return rule


def one_word(
    option: PrimitiveTypeInfo,
    types: tuple[type, ...],
    metavar: str,
    read: Callable[[str], Any],
    show: Callable[[Any], str],
) -> PrimitiveConstructorSpec | None:
    """How tyro reads an option whose value is one word on the command line.

    Args:
        option: Option that tyro asks about.
        types: Types of its value, besides None.
        metavar: Name of the value in the help.
        read: Value of a word; raises `ValueError` with one line.
        show: Word of a value.

    Returns:
        None for options that hold anything else.
    """
    from tyro.constructors import PrimitiveConstructorSpec

    choices = set(getattr(option.type, "__args__", [option.type])) - {type(None)}
    if not choices or not choices <= set(types):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,  # the default is ours, and read() made the rest
        str_from_instance=lambda value: [show(value)],
    )
