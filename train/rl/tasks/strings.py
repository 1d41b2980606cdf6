"""Tasks of copying, reversing and sorting a few characters."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.problems import answer_of, at_least, at_most
from train.rl.tasks.generated import Generated
from train.rl.types import Completion, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Generated):
    """Copying: `abc>` is answered by `abc`.

    Attributes:
        length: Maximum length of the text.
        shortest: Minimum length of the text.
        alphabet: Characters to sample the text from.
        partial: Whether the reward of a wrong answer is the fraction of characters at the right
            position, rather than 0. A wrong answer is a failure in either case.
    """

    word: ClassVar[str] = "copy"
    length: int = 4
    shortest: int = 1
    alphabet: str = "abcdefghij"
    partial: bool = False

    def check(self) -> None:
        at_least(self, shortest=1, length=self.shortest)
        at_most(self, length=10_000)
        if not self.alphabet or any(c.isspace() or c in ">" for c in self.alphabet):
            raise ValueError(
                f"{self.word}: alphabet={self.alphabet!r}: choose characters other than space "
                "and '>'"
            )

    def answer(self, text: str) -> str:
        return text

    def draw(self, rng: np.random.Generator) -> tuple[str, str, str]:
        length = int(rng.integers(self.shortest, self.length + 1))
        text = "".join(self.alphabet[i] for i in rng.integers(0, len(self.alphabet), length))
        return f"{text}>", self.answer(text), f"length {length}"

    def score(self, completion: Completion) -> Reward:
        reward = super().score(completion)
        if not self.partial or reward.success:
            return reward
        said, answer = answer_of(completion.text), completion.problem.answer
        hits = sum(a == b for a, b in zip(said, answer, strict=False))
        return dataclasses.replace(reward, value=hits / max(len(said), len(answer)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reverse(Copy):
    """Reversing: `abc>` is answered by `cba`; the options are those of `copy`."""

    word: ClassVar[str] = "reverse"

    def answer(self, text: str) -> str:
        return text[::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sort(Copy):
    """Sorting: `cab>` is answered by `abc`; the options are those of `copy`."""

    word: ClassVar[str] = "sort"

    def answer(self, text: str) -> str:
        return "".join(sorted(text))
