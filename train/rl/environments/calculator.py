"""Environment of arithmetic problems with a calculator as a tool."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.expressions import evaluate, number_text
from train.rl.environments.questions import QuestionWithTools
from train.rl.environments.tools import CalculatorTool
from train.rl.problems import at_least, at_most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calculator(QuestionWithTools):
    """Arithmetic with a calculator tool: a prompt is `(371*84)-59? `, a call is `calc(371*84)`.

    A text that is not a tool call is the final answer and ends the episode. The calculator
    evaluates numbers, `+ - * /` and brackets exactly. The scripted player passes the whole
    expression to the calculator and answers with the result.

    Attributes:
        terms: Number of operands in the expression.
        digits: Maximum number of digits of an operand.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (an empty text), which uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
        max_argument: Maximum number of characters of a call's argument; a longer call fails.
    """

    word: ClassVar[str] = "calculator"
    terms: int = 3
    digits: int = 3
    max_turns: int = 4

    def check(self) -> None:
        at_least(self, terms=2, digits=1, max_argument=1)
        at_most(self, terms=16, digits=9)

    @property
    def tools(self) -> tuple[CalculatorTool]:
        return (CalculatorTool(),)

    def draw(self, rng: np.random.Generator) -> tuple[list[str], str]:
        text = self._number(rng)
        for term in range(1, self.terms):
            text = f"({text})" if term > 1 else text
            text += f"{'+-*'[rng.integers(3)]}{self._number(rng)}"
        return [f"{text}?", number_text(evaluate(text))], f"terms {self.terms}"

    def _number(self, rng: np.random.Generator) -> str:
        return str(rng.integers(1, 10 ** rng.integers(1, self.digits + 1)))

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        number = self._number(rng)
        return f"calc({self._number(rng)}+{number})" if rng.random() < 0.5 else number

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        if len(shown) == 1:
            return f"calc({shown[0].rstrip('? ')})"
        return shown[-1].strip()
