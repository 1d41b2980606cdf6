"""Questions about facts, some of which are not stated: answer or abstain."""

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

    A hidden fact has a value like the others that is not stated, so a guess can hit it. The reward
    goes by the outcome (TruthRL, arXiv 2509.25760): with ten values guessing is worth 2/10 - 1.
    Success is a stated fact that is answered or a hidden one that is abstained from: a lucky guess
    is none. Info has the shares `accurate`, `abstained` and `hallucinated` and their
    `truthfulness`, accurate - hallucinated.

    Attributes:
        facts: Number of stated facts.
        values: Number of values of a fact, from 0.
        hidden: Share of questions whose fact is not stated.
        right: Reward of a right answer.
        abstain: Reward of abstaining.
        wrong: Reward of a wrong answer.
        knowledge: Whether abstaining from a hidden fact is worth `right` and anything else `wrong`
            (knowledge-enhanced).
        unknown: Text that abstains. Only the whole answer does: "?4" is an answer.
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
        right = said == problem.answer
        outcome = ternary(
            Reward(0.0, right), abstained, right=self.right, abstain=self.abstain, wrong=self.wrong
        )
        value = outcome.value
        if self.knowledge and hidden:
            value = self.right if abstained else self.wrong
        wrong = not right and not abstained
        info = {
            "accurate": float(right),
            "abstained": float(abstained),
            "hallucinated": float(wrong),
            "truthfulness": float(right) - float(wrong),
        }
        return Reward(value, abstained if hidden else right, info)
