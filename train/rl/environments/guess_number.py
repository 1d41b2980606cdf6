"""A number to guess in several turns."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from train.rl.problems import TEST_SHARE, answer_of, at_least, digest, options
from train.rl.types import Completion, Problem, Split, Turn


@dataclasses.dataclass(frozen=True)
class Guessing:
    """State of an episode: the secret number, turns so far, malformed ones, whether it is over."""

    secret: int
    turns: int = 0
    malformed: int = 0
    over: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuessNumber:
    """Guessing: the prompt is `1-10? `, observations are ` higher ` and ` lower `.

    The reward of a turn is 1 for the secret number and 0 for another one: turns that run out are
    worth nothing, however near the last guess was. With a discount, bisection is best. Numbers are
    held out by rank of a hash, whatever the seed. The scripted player bisects.

    Attributes:
        low: Least number.
        high: Greatest number.
        max_turns: Number of turns after which the episode is cut.
        malformed: Reward of a text that is no number within the bounds; it takes a turn.
        strict: Whether such a text ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "guess_number"
    low: int = 1
    high: int = 10
    max_turns: int = 8
    malformed: float = -0.1
    strict: bool = False
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        at_least(self, low=0, max_turns=1)
        if not self.low + 1 < self.high < 10**6:
            raise ValueError(
                f"guess_number: low={self.low} and high={self.high}: choose three numbers or more, "
                "below a million, so that one can be held out"
            )
        ranked = sorted(range(self.low, self.high + 1), key=lambda n: (digest(f"{n}"), n))
        held = max(1, len(ranked) // TEST_SHARE)
        rng = np.random.default_rng(self.seed)
        secrets = {"test": ranked[:held], "train": ranked[held:]}
        ordered = {split: rng.permutation(secrets[split]).tolist() for split in ("train", "test")}
        object.__setattr__(self, "_secrets", ordered)

    @property
    def name(self) -> str:
        return self.word + options(self)

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {split: len(numbers) for split, numbers in self._held.items()}

    @property
    def _held(self) -> dict[Split, list[int]]:
        return getattr(self, "_secrets")  # noqa: B009 (frozen: set past the fields)

    def problem(self, split: Split, index: int) -> Problem:
        secret = self._held[split][index]
        uid = f"guess_number-{self.low}-{self.high}-{secret}"
        return Problem(uid, f"{self.low}-{self.high}? ", secret)

    def reset(self, problem: Problem) -> Guessing:
        return Guessing(problem.answer)

    def step(self, state: Guessing, action: Completion) -> Turn:
        """Turn after a guess.

        Raises:
            ValueError: The episode is over.
        """
        if state.over:
            raise ValueError("guess_number: the episode is over: reset before the next step")
        said = answer_of(action.text)
        guess = int(said) if re.fullmatch("[0-9]{1,7}", said) else None
        formed = guess is not None and self.low <= guess <= self.high
        right = formed and guess == state.secret
        terminated = right or (self.strict and not formed)
        turns, malformed = state.turns + 1, state.malformed + (not formed)
        truncated = not terminated and turns == self.max_turns
        if right:
            observation = " right "
        elif formed and guess is not None:
            observation = " higher " if guess < state.secret else " lower "
        else:
            observation = f" {self.low}-{self.high}? "
        return Turn(
            Guessing(state.secret, turns, malformed, terminated or truncated),
            observation,
            1.0 if right else 0.0 if formed else self.malformed,
            terminated,
            truncated,
            right,
            {"malformed": float(malformed)},
        )

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        """A random number within the bounds (`GeneratedEnvironment.random_action`)."""
        return str(rng.integers(self.low, self.high + 1))

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        """The middle of the numbers that are left (`GeneratedEnvironment.scripted_action`)."""
        low, high = self.low, self.high
        for guess, observation in zip(map(int, shown[1::2]), shown[2::2], strict=True):
            low, high = (guess + 1, high) if "higher" in observation else (low, guess - 1)
        return str((low + high) // 2)
