"""Questions about facts, some of which cannot be known: answer or abstain."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.problems import answer_of, at_least
from train.rl.tasks.generated import Generated
from train.rl.tasks.shaping import ternary
from train.rl.types import Completion, Reward

NAMES = ("red", "blue", "green", "black", "white", "pink", "gold", "grey", "brown", "lime")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenFacts(Generated):
    """`red=4 blue=7; red?` is answered by `4`; `red=4 blue=7; pink?` by `?`, one does not know.

    A hidden fact has a value like the others that is not said, so a guess can hit it: its value
    goes by the outcome (TruthRL, arXiv 2509.25760), so that with ten values guessing is worth
    2/10 - 1. Success is a stated fact that is told or a hidden one that is abstained from: a lucky
    guess is none. Info has the shares `accurate`, `abstained` and `hallucinated` and their
    `truthfulness`, accurate - hallucinated.

    Attributes:
        facts: stated ones.
        values: numbers from 0 that a fact can be.
        hidden: share of questions whose fact is not stated.
        right, abstain, wrong: values of the outcomes.
        knowledge: with a hidden fact, abstaining is worth `right` and anything else `wrong`
            (knowledge-enhanced).
        unknown: the text that abstains. Only the whole answer does: "?4" is an answer.
    """

    word: ClassVar[str] = "hidden_facts"
    facts: int = 2
    values: int = 10
    hidden: float = 0.5
    right: float = 1.0
    abstain: float = 0.0
    wrong: float = -1.0
    knowledge: bool = False
    unknown: str = "?"

    def check(self) -> None:
        at_least(self, facts=1, values=2)
        if self.facts >= len(NAMES):
            raise ValueError(f"hidden_facts: facts={self.facts}: choose {len(NAMES) - 1} or less")
        if not 0 <= self.hidden <= 1:
            raise ValueError(f"hidden_facts: hidden={self.hidden}: choose from 0 to 1")
        if not self.wrong < self.right:
            raise ValueError(
                f"hidden_facts: right={self.right} is not more than wrong={self.wrong}: "
                "choose it larger"
            )
        if answer_of(self.unknown) != self.unknown or not self.unknown or self.unknown.isdecimal():
            raise ValueError(
                f"hidden_facts: unknown={self.unknown!r}: choose one line that is no number"
            )

    @property
    def failure_value(self) -> float:
        return self.wrong

    def draw(self, rng: np.random.Generator) -> tuple[str, str, str]:
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[: self.facts + 1]]
        values = [int(value) for value in rng.integers(0, self.values, len(names))]
        stated = " ".join(
            f"{name}={value}" for name, value in zip(names[1:], values[1:], strict=True)
        )
        hidden = rng.random() < self.hidden
        asked = 0 if hidden else 1 + int(rng.integers(self.facts))
        return f"{stated}; {names[asked]}?", str(values[asked]), "hidden" if hidden else "stated"

    def score(self, completion: Completion) -> Reward:
        problem, said = completion.problem, answer_of(completion.text)
        hidden, abstained = problem.kind == "hidden", said == self.unknown
        told = said == problem.answer
        outcome = ternary(
            Reward(0.0, told), abstained, right=self.right, abstain=self.abstain, wrong=self.wrong
        )
        value = outcome.value
        if self.knowledge and hidden:
            value = self.right if abstained else self.wrong
        wrong = not told and not abstained
        info = {
            "accurate": float(told),
            "abstained": float(abstained),
            "hallucinated": float(wrong),
            "truthfulness": float(told) - float(wrong),
        }
        return Reward(value, abstained if hidden else told, info)
