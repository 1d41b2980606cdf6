"""Environment of guessing a secret number in several turns."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.generated import GeneratedEnvironment, Move
from train.rl.problems import TEST_SHARE, at_least, digest
from train.rl.types import Problem, Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuessNumber(GeneratedEnvironment):
    """Guess a secret number: a prompt is `1-10? `, an observation is ` higher ` or ` lower `.

    The reward of a turn is 1 for the secret number and 0 for any other number, however near. With a
    discount, bisection is the best strategy, which the scripted player follows. The secret numbers
    of the test split are one fifth of all numbers, those with the smallest hashes, for every seed.

    Attributes:
        low: Smallest possible number.
        high: Largest possible number.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text that is not a number from `low` to `high`),
            which uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "guess_number"
    low: int = 1
    high: int = 10

    def check(self) -> None:
        at_least(self, low=0)
        if not self.low + 1 < self.high < 10**6:
            raise ValueError(
                f"guess_number: low={self.low} and high={self.high}: choose three numbers or more, "
                "below a million, so that one can be held out"
            )

    def prepare(self) -> None:
        ranked = sorted(range(self.low, self.high + 1), key=lambda n: (digest(f"{n}"), n))
        held = max(1, len(ranked) // TEST_SHARE)
        rng = np.random.default_rng(self.seed)
        secrets = {"test": ranked[:held], "train": ranked[held:]}
        ordered = {split: rng.permutation(secrets[split]).tolist() for split in ("train", "test")}
        object.__setattr__(self, "_secrets", ordered)

    @property
    def _held(self) -> dict[Split, list[int]]:
        return self.__dict__["_secrets"]

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {split: len(numbers) for split, numbers in self._held.items()}

    def problem(self, split: Split, index: int) -> Problem:
        secret = self._held[split][index]
        uid = f"guess_number-{self.low}-{self.high}-{secret}"
        return Problem(uid, self.prompt(secret), secret)

    def prompt(self, answer: int) -> str:
        return f"{self.low}-{self.high}? "

    def begin(self, answer: int) -> int:
        return answer

    def move(self, game: int, said: str) -> Move | None:
        guess = int(said) if re.fullmatch("[0-9]{1,7}", said) else None
        if guess is None or not self.low <= guess <= self.high:
            return None
        observation = " right " if guess == game else " higher " if guess < game else " lower "
        return Move(game, observation, guess == game)

    def reminder(self, game: int) -> str:
        return f" {self.prompt(game)}"

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        return str(rng.integers(self.low, self.high + 1))

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        low, high = self.low, self.high
        for guess, observation in zip(map(int, shown[1::2]), shown[2::2], strict=True):
            low, high = (guess + 1, high) if "higher" in observation else (low, guess - 1)
        return str((low + high) // 2)
