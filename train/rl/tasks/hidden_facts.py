"""Task of questions about facts, some of which are not stated: answer or abstain."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.problems import answer_of, at_least, at_most
from train.rl.tasks.generated import Generated
from train.rl.types import Completion, Problem, Reward

NAMES = ("red", "blue", "green", "black", "white", "pink", "gold", "grey", "brown", "lime")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenFacts(Generated):
    """Facts to state or abstain from: `red=4; red?` is answered by `4`, `red=4; pink?` by `?`.

    A hidden fact is not stated in the prompt but has a value, so a guess can be right. Success is
    to answer the question about a stated fact, or to abstain if the fact is hidden; a lucky guess
    is not a success. The task is meant for rewards by outcome, `--method truthrl` or
    `--reward ternary`, which count a lucky guess as a right answer: with ten values, the expected
    reward of a guess is 2/10 - 1.

    Attributes:
        facts: Number of stated facts.
        values: Number of possible values of a fact, counted from 0.
        hidden: Fraction of questions whose fact is not stated; such a question is out of knowledge.
        unknown: Text that abstains if it is the whole answer: "?4" does not abstain.
    """

    word: ClassVar[str] = "hidden_facts"
    facts: int = 2
    values: int = 10
    hidden: float = 0.5
    unknown: str = "?"

    def check(self) -> None:
        at_least(self, facts=1, values=2)
        at_most(self, facts=len(NAMES) - 1, values=10**9)
        if not 0 <= self.hidden <= 1:
            raise ValueError(f"hidden_facts: hidden={self.hidden}: choose from 0 to 1")
        if answer_of(self.unknown) != self.unknown or not self.unknown or self.unknown.isdecimal():
            raise ValueError(
                f"hidden_facts: unknown={self.unknown!r}: choose one line that is no number"
            )

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
        """Return reward 1 for the value of a stated fact or for abstaining if hidden, else 0."""
        problem = completion.problem
        expected = self.unknown if self.out_of_knowledge(problem) else problem.answer
        success = answer_of(completion.text) == expected
        return Reward(float(success), success)

    def golds(self, problem: Problem) -> tuple[str, ...]:
        """Return the value of the fact, whether it is stated or hidden."""
        return (problem.answer,)

    def normalize(self, text: str) -> str:
        """Return the text unchanged, because values are compared literally."""
        return text

    def out_of_knowledge(self, problem: Problem) -> bool:
        """Return whether the fact is hidden."""
        return problem.kind == "hidden"
