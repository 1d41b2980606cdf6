"""Environment of the game Mastermind: a secret code to find in several guesses."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.generated import GeneratedEnvironment, Move
from train.rl.problems import at_least, at_most

_MOST = 10**6  # maximum number of different codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mastermind(GeneratedEnvironment):
    """Mastermind: a prompt is `3 of 1-6? `, a guess `132`, an observation ` 1 exact 1 near `.

    `exact` is the number of digits of the guess at the right position. `near` is the number of the
    other digits of the guess that occur in the code at another position. The scripted player
    guesses the first code that agrees with all observations.

    Attributes:
        length: Number of digits of the code.
        colours: Number of different digits; a code consists of digits from 1 to `colours`.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text that is not a code), which uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "mastermind"
    length: int = 3
    colours: int = 6
    max_turns: int = 10

    def check(self) -> None:
        at_least(self, length=1, colours=2)
        at_most(self, colours=9)
        if self.length > _MOST.bit_length() or self.colours**self.length > _MOST:
            raise ValueError(
                f"mastermind: length={self.length} and colours={self.colours} make more than a "
                "million codes: choose smaller ones"
            )

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        return "".join(map(str, rng.integers(1, self.colours + 1, self.length))), ""

    def prompt(self, answer: str) -> str:
        return f"{self.length} of 1-{self.colours}? "

    def begin(self, answer: str) -> str:
        return answer

    def move(self, game: str, said: str) -> Move | None:
        if not re.fullmatch(f"[1-{self.colours}]{{{self.length}}}", said):
            return None
        exact, near = feedback(game, said)
        return Move(game, f" {exact} exact {near} near ", exact == self.length)

    def reminder(self, game: str) -> str:
        return f" {self.prompt(game)}"

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        return self.draw(rng)[0]

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        seen = [
            (guess, tuple(map(int, re.findall("[0-9]+", answer))))
            for guess, answer in zip(shown[1::2], shown[2::2], strict=True)
        ]
        digits = "123456789"[: self.colours]
        for code in map("".join, itertools.product(digits, repeat=self.length)):
            if all(feedback(code, guess) == answer for guess, answer in seen):
                return code
        return self.random_action(shown, rng)


def feedback(code: str, guess: str) -> tuple[int, int]:
    """Count the digits of a guess that are in the code.

    Args:
        code: Secret code.
        guess: Guess of the same length.

    Returns:
        The number of digits at the right position, and the number of other digits of the guess that
        occur in the code at another position.
    """
    exact = sum(a == b for a, b in zip(code, guess, strict=True))
    common = sum(min(code.count(digit), guess.count(digit)) for digit in set(guess))
    return exact, common - exact
