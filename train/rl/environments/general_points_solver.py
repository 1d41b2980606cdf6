"""Exact solver and verifier for formulas that make a target from given numbers."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction

from train.rl.environments.expressions import evaluate

Formula = int | tuple[str, "Formula", "Formula"]
"""A number, or a tuple of an operator (`+`, `-`, `*` or `/`) and its two operands."""

MOST_NUMBERS = 5

_LEGAL = re.compile(r"[0-9+\-*/() ]+")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def solve(numbers: Sequence[int], target: int) -> Formula | None:
    """Find a formula that uses each number exactly once and equals the target exactly.

    Args:
        numbers: From 1 to `MOST_NUMBERS` whole numbers above 0, in any order.
        target: Whole number above 0.

    Returns:
        A formula, or None if there is none.

    Raises:
        ValueError: There are too many numbers, or a number or the target is below 1.
    """
    if not 1 <= len(numbers) <= MOST_NUMBERS or min(*numbers, target) < 1:
        raise ValueError(
            f"numbers={tuple(numbers)} and target={target}: choose 1 to {MOST_NUMBERS} numbers, "
            "all above 0"
        )
    return _solve(tuple(sorted(numbers)), target)


@functools.lru_cache(maxsize=4096)
def _solve(numbers: tuple[int, ...], target: int) -> Formula | None:
    if len(numbers) == 1:
        return numbers[0] if numbers[0] == target else None
    wanted = Fraction(target)
    for some, others in _splits(numbers):
        found = _values(others)
        for value, formula in _values(some).items():
            # Value that `others` must make, for each operator between the two parts.
            needed = [("+", wanted - value, False), ("-", value - wanted, False),
                      ("-", wanted + value, True)]  # fmt: skip
            if value:
                needed += [("*", wanted / value, False), ("/", value / wanted, False),
                           ("/", wanted * value, True)]  # fmt: skip
            for sign, other, swapped in needed:
                if other in found and (sign != "/" or swapped or other):
                    pair = (found[other], formula) if swapped else (formula, found[other])
                    return sign, *pair
    return None


@functools.lru_cache(maxsize=4096)
def _values(numbers: tuple[int, ...]) -> dict[Fraction, Formula]:
    """Map each value that the numbers can make to one formula that makes it."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): numbers[0]}
    found: dict[Fraction, Formula] = {}
    for some, others in _splits(numbers):
        pairs = itertools.product(_values(some).items(), _values(others).items())
        for (a, left), (b, right) in pairs:
            made = [(a + b, "+", left, right), (a - b, "-", left, right), (b - a, "-", right, left),
                    (a * b, "*", left, right)]  # fmt: skip
            if b:
                made.append((a / b, "/", left, right))
            if a:
                made.append((b / a, "/", right, left))
            for value, *formula in made:
                found.setdefault(value, tuple(formula))  # pyright: ignore[reportArgumentType]
    return found


def _splits(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the splits of some numbers into two parts, the smaller first, without duplicates."""
    seen = set()
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in itertools.combinations(range(len(numbers)), size):
            some = tuple(numbers[i] for i in chosen)
            if some not in seen:
                seen.add(some)
                yield some, tuple(n for i, n in enumerate(numbers) if i not in chosen)


def formula_text(formula: Formula) -> str:
    """Format a formula as a text, without redundant brackets except in `a*(b/c)`."""
    if isinstance(formula, int):
        return str(formula)
    sign, left, right = formula
    level = _PRECEDENCE[sign]
    # Brackets on the right of an equal sign: a-(b-c), a/(b*c); sums and products need none.
    right_level = level + (sign in "-/" or sign == "*" and _sign(right) == "/")
    return f"{_bracketed(left, level)}{sign}{_bracketed(right, right_level)}"


def _bracketed(formula: Formula, level: int) -> str:
    text, sign = formula_text(formula), _sign(formula)
    return f"({text})" if sign and _PRECEDENCE[sign] < level else text


def _sign(formula: Formula) -> str:
    return "" if isinstance(formula, int) else formula[0]


def steps(formula: Formula) -> list[str]:
    """List the operations of a formula in the order of evaluation, as texts such as `3*8=24`."""
    return _steps(formula)[1]


def _steps(formula: Formula) -> tuple[Fraction, list[str]]:
    if isinstance(formula, int):
        return Fraction(formula), []
    sign, left, right = formula
    (a, before), (b, then) = _steps(left), _steps(right)
    value = evaluate(f"({a}){sign}({b})")
    shown = [f"({x})" if x.denominator > 1 else str(x) for x in (a, b)]
    return value, [*before, *then, f"{shown[0]}{sign}{shown[1]}={value}"]


def value_of(text: str, numbers: Sequence[int]) -> Fraction | None:
    """Compute the exact value of a formula that uses each of the given numbers exactly once.

    A formula may contain whole numbers, `+ - * /`, brackets and spaces.

    Args:
        text: Formula, or any other text.
        numbers: Numbers that were dealt.

    Returns:
        The value, or None for a text that is not such a formula or cannot be evaluated.
    """
    if not _LEGAL.fullmatch(text[:300]):
        return None
    try:
        value = evaluate(text)
    except ValueError:
        return None
    return value if Counter(map(int, re.findall("[0-9]+", text))) == Counter(numbers) else None
