"""Exact evaluation of arithmetic expressions by a size-limited parser, without `eval`."""

import re
from fractions import Fraction

LONGEST = 256
"""Maximum number of characters of an expression."""

_DEPTH = 32  # maximum nesting of brackets and signs
_DECIMALS = 6  # maximum number of decimals that are shown
_BITS = 512  # maximum size of a numerator or denominator
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)|([-+*/()]))")


def evaluate(text: str) -> Fraction:
    """Compute the exact value of an expression of numbers, `+ - * /` and brackets.

    `*` and `/` bind more tightly than `+` and `-`; operators of equal precedence are evaluated from
    left to right. A sign in front of a number or a bracket binds most tightly.

    Args:
        text: Expression, such as `2*(3-1.5)`.

    Raises:
        ValueError: The text is not an expression, has more than `LONGEST` characters, nests more
            than 32 brackets and signs, or divides by zero, or a number in it or an intermediate
            result needs more than 512 bits.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters: write {LONGEST} or less")
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position:].lstrip()[0]!r}")
        tokens.append(match[1] or match[2])
        position = match.end()
    value, rest = _sum(tokens, 0)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}")
    return value


def number_text(value: Fraction) -> str:
    """Format a number with at most six decimals and without trailing zeros.

    A value half-way between two six-decimal numbers is rounded to the number with an even last
    digit.
    """
    scaled = round(value * 10**_DECIMALS)
    whole, decimals = divmod(abs(scaled), 10**_DECIMALS)
    text = f"{whole}.{decimals:0{_DECIMALS}}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text


def _sum(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, rest = _product(tokens, depth)
    while rest and rest[0] in "+-":
        sign = rest[0]
        other, rest = _product(rest[1:], depth)
        value = _checked(value + other if sign == "+" else value - other)
    return value, rest


def _product(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, rest = _factor(tokens, depth)
    while rest and rest[0] in "*/":
        sign = rest[0]
        other, rest = _factor(rest[1:], depth)
        if sign == "/" and not other:
            raise ValueError("division by zero")
        value = _checked(value * other if sign == "*" else value / other)
    return value, rest


def _factor(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    if depth > _DEPTH:
        raise ValueError(f"more than {_DEPTH} brackets or signs in each other")
    if not tokens:
        raise ValueError("the end came too early")
    first, *rest = tokens
    if first in "+-":
        value, rest = _factor(rest, depth + 1)
        return (-value if first == "-" else value), rest
    if first == "(":
        value, rest = _sum(rest, depth + 1)
        if not rest or rest[0] != ")":
            raise ValueError("a bracket is not closed")
        return value, rest[1:]
    if not first[0].isdigit():
        raise ValueError(f"unexpected {first!r}")
    return _checked(Fraction(first)), rest


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
        raise ValueError("the number is too large")
    return value
