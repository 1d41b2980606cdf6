"""Rules that tell tyro how to parse options of this project's types; tyro is imported lazily."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

RULES: list[Callable[[Any], Any]] = []
"""Functions from a tyro option to its parsing spec, or to None if the rule does not apply."""


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
    """Make the parsing spec of an option whose value is one word on the command line.

    Args:
        option: Option to parse, as tyro describes it.
        types: Types that the value may have, besides None.
        metavar: Name of the value in the help.
        read: Function from the word to the value, which raises a one-line `ValueError`.
        show: Function from a value to its word.

    Returns:
        Parsing spec for tyro, or None if the option may have values of other types.
    """
    from tyro.constructors import PrimitiveConstructorSpec

    choices = set(getattr(option.type, "__args__", [option.type])) - {type(None)}
    if not choices or not choices <= set(types):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,  # defaults and results of read() are valid
        str_from_instance=lambda value: [show(value)],
    )
