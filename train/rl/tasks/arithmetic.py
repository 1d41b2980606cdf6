"""Arithmetic tasks: `12+7=` is answered by `19`."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.problems import at_least, at_most
from train.rl.tasks.generated import Generated

_MOST_DIGITS = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(Generated):
    """Sums, differences or products of two whole numbers: `12+7=` is answered by `19`.

    Attributes:
        digits: Maximum number of digits of an operand.
        operators: Operators to sample from, such as "+-*".
    """

    word: ClassVar[str] = "arithmetic"
    digits: int = 2
    operators: str = "+"

    def check(self) -> None:
        at_least(self, digits=1)
        at_most(self, digits=_MOST_DIGITS)
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"arithmetic: operators={self.operators!r}: choose of '+-*'")

    def draw(self, rng: np.random.Generator) -> tuple[str, str, str]:
        first, second = (int(number) for number in rng.integers(0, 10**self.digits, 2))
        operator = self.operators[rng.integers(len(self.operators))]
        result = {"+": first + second, "-": first - second, "*": first * second}[operator]
        return f"{first}{operator}{second}=", str(result), operator


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainSum(Generated):
    """Sums and differences of several whole numbers: `4-7+2=` is answered by `-1`.

    Attributes:
        terms: Maximum number of terms.
        fewest: Minimum number of terms, 2 or more.
        digits: Maximum number of digits of a term.
    """

    word: ClassVar[str] = "chain_sum"
    terms: int = 4
    fewest: int = 2
    digits: int = 1

    def check(self) -> None:
        at_least(self, digits=1, fewest=2, terms=self.fewest)
        at_most(self, digits=_MOST_DIGITS, terms=1000)

    def draw(self, rng: np.random.Generator) -> tuple[str, str, str]:
        count = int(rng.integers(self.fewest, self.terms + 1))
        numbers = [int(number) for number in rng.integers(0, 10**self.digits, count)]
        signs = [1, *(int(sign) for sign in rng.choice([-1, 1], count - 1))]
        later = zip(signs[1:], numbers[1:], strict=True)
        text = str(numbers[0]) + "".join(f"{'+' if sign > 0 else '-'}{n}" for sign, n in later)
        total = sum(sign * number for sign, number in zip(signs, numbers, strict=True))
        return f"{text}=", str(total), f"{count} terms"
